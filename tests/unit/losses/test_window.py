"""Which generated positions the flow loss looks at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_phf import reference
from megatron_phf.losses import WINDOW_RULES, select_window, window_batch


@given(st.integers(0, 3000), st.integers(2, 200), st.sampled_from(sorted(WINDOW_RULES)))
def test_properties(num_tokens: int, size: int, rule: str) -> None:
    window = select_window(num_tokens, size, rule)
    assert len(window) == min(num_tokens, size)
    assert (window[1:] > window[:-1]).all()  # sorted, no duplicates
    if num_tokens:
        assert window[0] == 0
        assert window[-1] < num_tokens
        if rule == "even":
            assert window[-1] == num_tokens - 1  # both ends
    assert window.tolist() == reference.window(num_tokens, size, rule)


def test_by_hand() -> None:
    assert select_window(11, 5).tolist() == [0, 3, 5, 8, 10]  # 2.5 and 7.5 round up
    assert select_window(11, 5, "contiguous").tolist() == [0, 1, 2, 3, 4]


def test_batch() -> None:
    positions, valid = window_batch([5, 1, 0], 3)
    assert positions.tolist() == [[0, 2, 4], [0, 0, 0], [0, 0, 0]]
    assert valid.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert window_batch([0])[0].shape == torch.Size([1, 1])


def test_bad_settings() -> None:
    with pytest.raises(KeyError, match="odd"):
        select_window(9, 4, "odd")
    with pytest.raises(AssertionError, match="needs at least 2"):
        select_window(3, 1)
