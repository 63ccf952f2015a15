"""Linear CKA: are the window's positions as alike to the student as they are to the teacher?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_phf.hidden.term import HiddenTerm

if TYPE_CHECKING:
    from torch import Tensor


class LinearCKA(HiddenTerm):
    """1 - CKA, CKA = <K^S, K^T>_F / (||K^S||_F ||K^T||_F), K = X X^T of the centred rows X.

    The same for any rotation, shift and scale of either side; the hidden sizes may differ.  A
    sequence whose rows are all alike on one side (or a single one) gives 0, without gradient.
    """

    name = "cka"
    source = "Kornblith et al., arXiv:1905.00414, linear CKA"
    label = "1 - CKA"
    states = "centred_rows"

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Products of centred rows [b, m, m] of both -> [b]."""
        squares = [x.square().sum((-1, -2)) for x in (student, teacher)]
        some = (squares[0] > 0) & (squares[1] > 0)
        # The root's gradient at 0 is infinite: replace the 0 before the root, not after.  Two
        # roots, as the product of the squares may be beyond fp32.
        norms = [x.where(some, x.new_ones(())).sqrt() for x in squares]
        alike = (student * teacher).sum((-1, -2)) / norms[0] / norms[1]
        return (1 - alike).where(some, alike.new_zeros(()))
