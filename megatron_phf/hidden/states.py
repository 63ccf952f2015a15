"""What is made of hidden states at the window before a term compares it; torch only.

Shapes: b sequences, m window positions, h hidden channels.  The Gram and cosine work is done in
fp32 (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_phf.hidden.term import STATES


def _working(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def directions(hidden: Tensor, valid: Tensor) -> Tensor:
    """hidden [b, m, h], valid bool [b, m] -> unit transitions D [b, m-1, h].

    d_i = delta_i / ||delta_i||, delta_i = h_{w_{i+1}} - h_{w_i}.  A transition that is rounding
    alone (see :func:`rounding`), and one with an invalid end, has direction 0 and no gradient.
    """
    return _Directions.apply(hidden, valid)


def rounding(dtype: torch.dtype) -> float:
    """The share of its ends' larger norm up to which a transition is rounding.

    A token that repeats has one state in exact arithmetic, and in fp32 states that differ by a few
    eps, more with depth.  Half an eps of a 16-bit type: several would hide transitions that count.
    """
    eps = torch.finfo(dtype).eps
    return 32 * eps if dtype in (torch.float32, torch.float64) else eps / 2


class _Directions(torch.autograd.Function):
    """By hand: autograd takes three times as many passes over [b, m, h], and keeps more."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, valid: Tensor) -> Tensor:
        wide = _working(hidden)
        delta = wide[:, 1:] - wide[:, :-1]
        norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        least = torch.maximum(size[:, 1:], size[:, :-1]) * rounding(hidden.dtype)
        both = (valid[:, 1:] & valid[:, :-1])[..., None]
        still = ~(both & (norm > least))
        inverse = norm.reciprocal_().masked_fill_(still, 0.0)
        # Mask, do not multiply: inf * 0 is nan.
        unit = delta.mul_(inverse).masked_fill_(still, 0.0)
        ctx.save_for_backward(unit, inverse)
        ctx.dtype = hidden.dtype
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        unit, inverse = ctx.saved_tensors
        # d delta = (d unit - unit <unit, d unit>) / ||delta||
        along = (unit * grads[0]).sum(-1, keepdim=True)
        delta = torch.addcmul(grads[0], unit, along, value=-1).mul_(inverse)
        hidden = torch.nn.functional.pad(delta, (0, 0, 1, 0))
        hidden[:, :-1].sub_(delta)
        return hidden.to(ctx.dtype), None


def rows(hidden: Tensor, valid: Tensor) -> Tensor:
    """hidden [b, m, h], valid bool [b, m] -> the hidden states themselves, 0 where not valid."""
    return torch.where(valid[..., None], _working(hidden), 0.0)


def unit_states(hidden: Tensor, valid: Tensor) -> Tensor:
    """hidden [b, m, h], valid bool [b, m] -> unit hidden states, 0 where not valid."""
    return rows(torch.nn.functional.normalize(_working(hidden), dim=-1), valid)


def centred_rows(hidden: Tensor, valid: Tensor) -> Tensor:
    """hidden [b, m, h], valid bool [b, m] -> hidden states less their mean over valid positions."""
    whole = rows(hidden, valid)
    mean = whole.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    return rows(whole - mean, valid)


def transition_counts(valid: Tensor) -> Tensor:
    """valid bool [b, m] -> transitions of each sequence, int64 [b]: m_i - 1, at least 0."""
    return STATES["transitions"].counts(valid)


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


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return first @ second.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        first, second = ctx.saved_tensors
        return grads[0] @ second, grads[0].mT @ first


def product(first: Tensor, second: Tensor) -> Tensor:
    """D, E [b, n, h] -> D E^T [b, n, n]; both gradients in the layout of what they add up with."""
    return _Product.apply(first, second)


class LayerEnds:
    """States of one model at a layer l and the layer before it, by kind; ``compared`` by a term."""

    def __init__(
        self, own: Mapping[str, Tensor], before: Callable[[str], Tensor] | None = None
    ) -> None:
        """``before``: None on layer 1, which has no pair."""
        self._own, self._before = own, before
        self._products: dict[tuple[str, str], Tensor] = {}

    def states(self, kind: str) -> Tensor:
        """[b, n, h] of layer l."""
        return self._own[kind]

    def products(self, kind: str, over: str) -> Tensor:
        """[b, n, n] of layer l with itself, or of layers l-1 and l; made once."""
        key = kind, over
        if key not in self._products:
            own = self._own[kind]
            if over == "layer":
                self._products[key] = gram(own)
            else:
                assert self._before is not None, "layer 1 has no pair"
                self._products[key] = product(self._before(kind), own)
        return self._products[key]
