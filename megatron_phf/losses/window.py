"""Which generated positions the flow loss looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW_RULES = ("even", "contiguous")


def select_window(num_tokens: int, max_positions: int = 128, rule: str = "even") -> Tensor:
    """Generated positions W of one sequence, int64 [m], m <= ``max_positions``, sorted.

    PHF (arXiv:2606.29340) has "a uniform 128-position window"; the rounding is this project's
    choice.  ``even``: all of them if they fit, else evenly spaced with both ends included, rounded
    to nearest.  ``contiguous``: the first ones; not the paper's.

    Raises:
        ValueError: an unknown rule, or fewer than two positions.
    """
    if rule not in WINDOW_RULES:
        raise ValueError(f"window rule {rule!r}: choose one of {', '.join(WINDOW_RULES)}")
    if max_positions < 2:
        raise ValueError(f"max_positions {max_positions}: a transition needs at least 2")
    if num_tokens <= max_positions:
        return torch.arange(num_tokens)
    index = torch.arange(max_positions)
    if rule == "contiguous":
        return index
    # Integer rounding to nearest: the spacing is above 1, so no two positions meet.
    gaps = max_positions - 1
    return (2 * index * (num_tokens - 1) + gaps) // (2 * gaps)


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
