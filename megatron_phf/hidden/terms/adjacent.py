"""Adjacent: do neighbouring layers' transitions stand to each other as the teacher's do?"""

from __future__ import annotations

from megatron_phf.hidden.terms.geometry import Geometry


class Adjacent(Geometry):
    """One pair's part of L_adj: ||C^S - C^T||_F^2 / (m-1)^2, C = D_l D_{l+1}^T."""

    name = "adjacent"
    source = "PHF, arXiv:2606.29340, L_adj"
    over = "pair"
