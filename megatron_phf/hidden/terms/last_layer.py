"""Last layer: do the layers before it already point where the teacher's last one does?"""

from __future__ import annotations

from megatron_phf.hidden.terms.pointwise import Pointwise


class LastLayer(Pointwise):
    """Mean over the window's positions of 1 - cos(h_l^S, h_L^T), L the teacher's last layer.

    ``--phf-layers`` names the layers that are taught; without it all are, the last one too.
    """

    name = "last_layer"
    source = "after OISD, arXiv:2605.29089 (it aligns logits and attention, not hidden states)"
    against = "last"
