"""Pointwise: are the hidden states themselves the teacher's?"""

from __future__ import annotations

from megatron_phf.hidden.terms.direction import Direction


class Pointwise(Direction):
    """Mean over the window's positions of 1 - cos(h^S, h^T): what PHF was compared with."""

    name = "pointwise"
    source = "PHF, arXiv:2606.29340, ablation of pointwise matching (its formula is ours)"
    states = "unit_rows"
