"""Geometry: do the student's transitions stand to each other as the teacher's do?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_phf.hidden.term import HiddenTerm

if TYPE_CHECKING:
    from torch import Tensor


class Geometry(HiddenTerm):
    """L_geo = ||G^S - G^T||_F^2 / (m-1)^2, G = D D^T; the hidden sizes may differ."""

    name = "geometry"
    source = "PHF, arXiv:2606.29340, L_geo"
    label = "mean square"

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Products of unit transitions [b, m-1, m-1] of both -> [b]."""
        return (student - teacher).square().sum((-1, -2)) / counts.clamp(min=1).square()
