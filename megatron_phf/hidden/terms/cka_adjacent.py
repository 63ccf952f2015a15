"""Linear CKA's pairs: are positions as alike across neighbouring layers as the teacher's are?"""

from __future__ import annotations

from megatron_phf.hidden.terms.cka import LinearCKA


class AdjacentCKA(LinearCKA):
    """1 - <C^S, C^T>_F / (||C^S||_F ||C^T||_F), C = X_l X_{l+1}^T of centred rows.

    What L_adj is to L_geo: the same for one rotation of both layers, any shift and any scale.
    """

    name = "cka_adjacent"
    source = "after linear CKA, arXiv:1905.00414, and PHF's L_adj (its formula is ours)"
    over = "pair"
