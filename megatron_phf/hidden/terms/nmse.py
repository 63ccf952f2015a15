"""Normalised mean square: how far are the hidden states, measured by the teacher's length?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_phf.hidden.term import HiddenTerm

if TYPE_CHECKING:
    from torch import Tensor


class NormalisedMSE(HiddenTerm):
    """||H^S - H^T||_F^2 / ||H^T||_F^2 over the window: one scale for all depths.

    Hidden states grow with depth, and their mean square with it.  (States of unit length have
    (2 / h) (1 - cosine): that is ``pointwise``.)  A window whose teacher states are 0 gives 0.
    """

    name = "nmse"
    source = "OPRD, arXiv:2606.06021 (names a normalised MSE; what normalises it is our reading)"
    label = "share of the teacher's square"
    states = "rows"
    compares = "states"

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Hidden states [b, m, h] of both -> [b]."""
        size = teacher.square().sum((-1, -2))
        distance = (student - teacher).square().sum((-1, -2))
        return (distance / size.where(size > 0, 1.0)).where(size > 0, 0.0)
