"""How long a cache of keys and values is for so many columns.  Without torch."""

from __future__ import annotations

_LEAST_COLUMNS = 64  # that the capacity grows by


def capacity_for(columns: int) -> int:
    """Columns to hold ``columns``, few sizes for any length: at most a quarter of them for nothing.

    Multiples of 64; 4 sizes a doubling.
    """
    step = _step(columns)
    return -(-columns // step) * step


def capacity_before(columns: int) -> int:
    """The size that a cache for ``columns`` had before it grew, a column at a time, to this one."""
    capacity = capacity_for(columns)
    return capacity - _step(capacity)


def _step(columns: int) -> int:
    return max(_LEAST_COLUMNS, 1 << max(columns - 1, 1).bit_length() >> 3)
