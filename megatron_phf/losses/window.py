"""Which generated positions the flow loss looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_phf.losses.window_rules import WINDOW_RULES


def select_window(num_tokens: int, max_positions: int = 128, rule: str = "even") -> Tensor:
    """Generated positions W of one sequence, int64 [m], m <= ``max_positions``, sorted.

    All of them if they fit, else what ``rule``, a row of ``WINDOW_RULES``, chooses.
    """
    assert max_positions >= 2, f"max_positions {max_positions}: a transition needs at least 2"
    if num_tokens <= max_positions:
        return torch.arange(num_tokens)
    return torch.tensor(WINDOW_RULES[rule](num_tokens, max_positions))


def window_batch(
    lengths: Sequence[int] | Tensor, max_positions: int = 128, rule: str = "even"
) -> tuple[Tensor, Tensor]:
    """lengths [b] -> (positions int64 [b, m], valid bool [b, m]), m the longest window here.

    Padding repeats position 0 and is not valid; m is at least 1.
    """
    windows = [select_window(int(n), max_positions, rule) for n in lengths]
    m = max([1, *(len(w) for w in windows)])
    positions = torch.zeros(len(windows), m, dtype=torch.int64)
    valid = torch.zeros(len(windows), m, dtype=torch.bool)
    for row, window in enumerate(windows):
        positions[row, : len(window)] = window
        valid[row, : len(window)] = True
    return positions, valid
