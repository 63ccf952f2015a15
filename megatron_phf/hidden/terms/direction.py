"""Direction: do the student's transitions point where the teacher's do?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_phf.hidden.term import HiddenTerm

if TYPE_CHECKING:
    from torch import Tensor


class Direction(HiddenTerm):
    """L_dir = 1/(m-1) sum_i (1 - <d^S_i, d^T_i>).

    A zero transition counts as the formula has it: it adds 1, without gradient.  A sequence
    without transitions gives 0.
    """

    name = "direction"
    source = "PHF, arXiv:2606.29340, L_dir"
    label = "1 - cosine"
    compares = "states"

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Unit transitions [b, m-1, h] of both -> [b]."""
        cosine = (student * teacher).sum((-1, -2))
        return (counts - cosine) / counts.clamp(min=1)
