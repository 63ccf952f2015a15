"""The flow loss of PHF (arXiv:2606.29340): how hidden states move along a rollout.

Shapes: b sequences, m window positions, h hidden channels, L layers.  The Gram and cosine work is
done in fp32 (float64 stays float64).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _working(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def directions(hidden: Tensor, valid: Tensor) -> Tensor:
    """hidden [b, m, h], valid bool [b, m] -> unit transitions D [b, m-1, h].

    d_i = delta_i / ||delta_i||, delta_i = h_{w_{i+1}} - h_{w_i}.  A zero transition, and one with
    an invalid end, has direction 0 and no gradient.
    """
    hidden = _working(hidden)
    delta = hidden[:, 1:] - hidden[:, :-1]
    both = valid[:, 1:] & valid[:, :-1]
    square = delta.square().sum(-1, keepdim=True)
    moving = both[..., None] & (square > 0)
    # The root's gradient at 0 is infinite: replace the 0 before the root, not after.
    norm = torch.where(moving, square, 1.0).sqrt()
    return torch.where(moving, delta / norm, 0.0)


def transition_counts(valid: Tensor) -> Tensor:
    """valid bool [b, m] -> transitions of each sequence, int64 [b]: m_i - 1, at least 0."""
    return (valid.sum(-1) - 1).clamp(min=0)


def _per_square(total: Tensor, counts: Tensor) -> Tensor:
    return total / counts.clamp(min=1).square()


def direction_loss(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """D^S, D^T [b, m-1, h], counts [b] -> L_dir [b] = 1/(m-1) sum_i (1 - <d^S_i, d^T_i>).

    A zero transition counts as the formula has it: it adds 1, without gradient.  A sequence
    without transitions gives 0.
    """
    cosine = (student * _working(teacher)).sum((-1, -2))
    return (counts - cosine) / counts.clamp(min=1)


def geometry_loss(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """D^S [b, m-1, h_S], D^T [b, m-1, h_T] -> L_geo [b] = ||G^S - G^T||_F^2 / (m-1)^2, G = D D^T.

    The hidden sizes may differ.
    """
    return adjacent_loss(student, student, teacher, teacher, counts)


def adjacent_loss(
    student_in: Tensor, student_out: Tensor, teacher_in: Tensor, teacher_out: Tensor, counts: Tensor
) -> Tensor:
    """Directions of layers l and l+1, each [b, m-1, h] -> ||C^S - C^T||_F^2 / (m-1)^2 [b].

    C = D_l D_{l+1}^T: the term of L_adj for one pair of neighbouring layers.
    """
    student = student_in @ student_out.mT
    teacher = _working(teacher_in) @ _working(teacher_out).mT
    return _per_square((student - teacher).square().sum((-1, -2)), counts)


def flow_layer_weights(num_layers: int) -> tuple[float, float]:
    """Weight in L_flow of one layer's L_layer = (L_dir + L_geo) / 2, and of one adjacent pair.

    L_flow = (mean over L layers + mean over L-1 pairs) / 2; with one layer there is no pair.
    """
    return 0.5 / num_layers, 0.5 / (num_layers - 1) if num_layers > 1 else 0.0


@dataclass(frozen=True)
class FlowTerms:
    """``loss`` = L_flow [], mean over sequences; parts [L], [L], [L-1], likewise means.

    ``short_sequences``: how many had fewer than two window positions; they contribute zero and
    stay in the means.
    """

    loss: Tensor
    direction_per_layer: Tensor
    geometry_per_layer: Tensor
    adjacent_per_pair: Tensor
    short_sequences: int

    @property
    def direction(self) -> Tensor:
        """Mean of L_dir over layers."""
        return self.direction_per_layer.mean()

    @property
    def geometry(self) -> Tensor:
        """Mean of L_geo over layers."""
        return self.geometry_per_layer.mean()

    @property
    def adjacent(self) -> Tensor:
        """L_adj: mean over pairs, 0 with one layer."""
        pairs = self.adjacent_per_pair
        return pairs.mean() if len(pairs) else self.loss.new_zeros(())


def flow_loss(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], valid: Tensor
) -> FlowTerms:
    """Hidden states of all L layers at the window, each [b, m, h]; valid bool [b, m] -> L_flow.

    The teacher is detached.

    Raises:
        ValueError: no layers, or student and teacher with different numbers of them.
    """
    if not student_hidden or len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"{len(student_hidden)} student and {len(teacher_hidden)} teacher layers: give the "
            "same number, at least one"
        )
    counts = transition_counts(valid)
    student = [directions(h, valid) for h in student_hidden]
    teacher = [directions(h.detach(), valid) for h in teacher_hidden]
    layers = list(zip(student, teacher, strict=True))
    direction = torch.stack([direction_loss(s, t, counts).mean() for s, t in layers])
    geometry = torch.stack([geometry_loss(s, t, counts).mean() for s, t in layers])
    pairs = [
        adjacent_loss(s, s_next, t, t_next, counts).mean()
        for (s, t), (s_next, t_next) in itertools.pairwise(layers)
    ]
    adjacent = torch.stack(pairs) if pairs else direction.new_zeros(0)
    local_weight, pair_weight = flow_layer_weights(len(layers))
    loss = local_weight * (direction + geometry).sum() / 2 + pair_weight * adjacent.sum()
    return FlowTerms(loss, direction, geometry, adjacent, int((counts == 0).sum()))
