"""The flow loss of PHF (arXiv:2606.29340): how hidden states move along a rollout.

Shapes: b sequences, m window positions, h hidden channels, L layers.  The Gram and cosine work is
done in fp32 (float64 stays float64).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_phf.flow_spec import FlowSpec, flow_weights
from megatron_phf.layer_map import check_layer_map


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


def unit_states(hidden: Tensor, valid: Tensor) -> Tensor:
    """hidden [b, m, h], valid bool [b, m] -> unit hidden states [b, m, h], 0 where not valid.

    What pointwise matching has in the place of transitions.
    """
    unit = torch.nn.functional.normalize(_working(hidden), dim=-1)
    return torch.where(valid[..., None], unit, 0.0)


def transition_counts(valid: Tensor) -> Tensor:
    """valid bool [b, m] -> transitions of each sequence, int64 [b]: m_i - 1, at least 0."""
    return (valid.sum(-1) - 1).clamp(min=0)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (grads[0] + grads[0].mT) @ rows


def gram(rows: Tensor) -> Tensor:
    """D [b, n, h] -> D D^T [b, n, n]; autograd's own gradient takes two products, this one."""
    return _Gram.apply(rows)


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
    teacher = _working(teacher)
    return product_loss(gram(student), teacher @ teacher.mT, counts)


def adjacent_loss(
    student_in: Tensor, student_out: Tensor, teacher_in: Tensor, teacher_out: Tensor, counts: Tensor
) -> Tensor:
    """Directions of layers l and l+1, each [b, m-1, h] -> ||C^S - C^T||_F^2 / (m-1)^2 [b].

    C = D_l D_{l+1}^T: the term of L_adj for one pair of neighbouring layers.  The hidden sizes of
    student and teacher may differ.
    """
    teacher = _working(teacher_in) @ _working(teacher_out).mT
    return product_loss(student_in @ student_out.mT, teacher, counts)


def product_loss(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """Products D D'^T [b, m-1, m-1] of student and teacher -> ||C^S - C^T||_F^2 / (m-1)^2 [b]."""
    return _per_square((student - teacher).square().sum((-1, -2)), counts)


@dataclass(frozen=True)
class FlowTerms:
    """``loss`` = L_flow [], mean over sequences; parts [L], [L], [L-1], likewise means, whether

    the loss counts them or not (at positions there is a direction alone, the rest is empty).

    ``direction_per_layer``: None where student and teacher have different hidden sizes.
    ``short_sequences``: how many had fewer than two window positions; they contribute zero and
    stay in the means.
    """

    loss: Tensor
    direction_per_layer: Tensor | None
    geometry_per_layer: Tensor
    adjacent_per_pair: Tensor
    short_sequences: int

    @property
    def direction(self) -> Tensor | None:
        """Mean of L_dir over layers."""
        return None if self.direction_per_layer is None else self.direction_per_layer.mean()

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
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    valid: Tensor,
    layer_map: Sequence[int] | None = None,
    spec: FlowSpec | None = None,
) -> FlowTerms:
    """Hidden states of all layers at the window, each [b, m, h]; valid bool [b, m] -> L_flow.

    The teacher is detached.  It may have another hidden size (no direction term then: L_layer is
    L_geo alone) and, with a layer map, another number of layers.

    Args:
        layer_map: the teacher layer (1-based) of each student layer, not decreasing, for example
            ``relative_layer_map(len(student_hidden), len(teacher_hidden))``; None: layer by layer.
        spec: which parts; None: all, which is PHF.

    Raises:
        ValueError: no layers, a map or layers that do not fit, different numbers of layers without
            a map, or nothing left of the loss.
    """
    spec = spec or FlowSpec()
    mapped = _mapped_layers(student_hidden, teacher_hidden, layer_map)
    has_direction = student_hidden[0].shape[-1] == mapped[0].shape[-1]
    weights = flow_weights(len(student_hidden), spec, has_direction)
    pointwise = spec.states == "positions"
    counts = valid.sum(-1) if pointwise else transition_counts(valid)
    rows = unit_states if pointwise else directions
    student = [rows(h, valid) for h in student_hidden]
    teacher = [rows(h.detach(), valid) for h in mapped]
    layers = list(zip(student, teacher, strict=True))
    direction = None
    if has_direction:
        direction = torch.stack([direction_loss(s, t, counts).mean() for s, t in layers])
    geometry, adjacent = _relations([] if pointwise else layers, counts)
    loss = student[0].new_zeros(())
    for values, weight in (
        (direction, weights.direction),
        (geometry, weights.geometry),
        (adjacent, weights.adjacent),
    ):
        if values is not None and len(values):
            loss = loss + (values * values.new_tensor(weight)).sum()
    return FlowTerms(loss, direction, geometry, adjacent, int((counts == 0).sum()))


def _relations(layers: Sequence[tuple[Tensor, Tensor]], counts: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of student and teacher by layer -> geometry [L] and adjacent [L-1] terms."""
    geometry = [geometry_loss(s, t, counts).mean() for s, t in layers]
    adjacent = [
        adjacent_loss(s, s_next, t, t_next, counts).mean()
        for (s, t), (s_next, t_next) in itertools.pairwise(layers)
    ]
    stacked = [torch.stack(x) if x else counts.new_zeros(0).float() for x in (geometry, adjacent)]
    return stacked[0], stacked[1]


def _mapped_layers(
    student: Sequence[Tensor], teacher: Sequence[Tensor], layer_map: Sequence[int] | None
) -> list[Tensor]:
    """The teacher's layer for each of the student's."""
    if not student or not teacher or (layer_map is None and len(student) != len(teacher)):
        raise ValueError(
            f"{len(student)} student and {len(teacher)} teacher layers: give the same number, at "
            "least one, or a layer_map (relative_layer_map)"
        )
    if layer_map is None:
        return list(teacher)
    check_layer_map(layer_map, len(student), len(teacher))
    return [teacher[k - 1] for k in layer_map]
