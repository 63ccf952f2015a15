"""Mean square: how far are the hidden states from the teacher's?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_phf.hidden.term import HiddenTerm

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquare(HiddenTerm):
    """Mean over the window's positions and the channels of (h^S - h^T)^2, in the states' unit."""

    name = "mse"
    source = "after OPRD, arXiv:2606.06021, on each layer's output and with a mean over sequences"
    label = "mean square"
    states = "rows"
    compares = "states"

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Hidden states [b, m, h] of both -> [b]."""
        distance = (student - teacher).square().sum((-1, -2))
        return distance / (counts.clamp(min=1) * student.shape[-1])
