"""The table of rules that choose the flow window's positions; no import of torch."""

from __future__ import annotations

from collections.abc import Callable


def _even(num_tokens: int, size: int) -> list[int]:
    """Evenly spaced with both ends, rounded to nearest: the spacing is above 1, so none repeats.

    PHF (arXiv:2606.29340) has "a uniform 128-position window"; the rounding is this project's.
    """
    gaps = size - 1
    return [(2 * i * (num_tokens - 1) + gaps) // (2 * gaps) for i in range(size)]


def _contiguous(num_tokens: int, size: int) -> list[int]:
    """The first ones; not the paper's."""
    return list(range(size))


# (tokens of a response, positions) -> positions, where there are more tokens than positions
WINDOW_RULES: dict[str, Callable[[int, int], list[int]]] = {
    "even": _even,
    "contiguous": _contiguous,
}
