"""Weights of the window's tokens in any term, which need not know of them; torch only.

A term is a mean over rows, or over pairs of rows, of a square or a product of states.  States
multiplied by the roots of their rows' weights make it the weighted mean, products by the roots of
both rows' weights.  Centred rows are centred anew, at their weighted mean, which products allow
too: (I - 1 w^T) X X'^T (I - w 1^T).  A transition has the mean of its two tokens' weights.  Weights
are scaled to mean 1 over the window's rows: a term keeps its scale, and what divides it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_phf.hidden.term import StateKind


class Ends(Protocol):
    """What a term may ask of one model at layer l (see ``states.LayerEnds``)."""

    def states(self, kind: str) -> Tensor:
        """[b, n, h]."""

    def products(self, kind: str, over: str) -> Tensor:
        """[b, n, n]."""


def _of_rows(kind: StateKind, weights: Tensor, valid: Tensor) -> Tensor:
    """Weights of tokens [b, m] -> those of rows [b, n] of states of ``kind``, mean 1."""
    tokens, n = weights.float() * valid, max(kind.rows(valid.shape[1]), 0)
    parts = [slice(i, i + n) for i in range(kind.span)]
    whole = torch.stack([valid[:, part] for part in parts]).all(0)
    rows = torch.stack([tokens[:, part] for part in parts]).mean(0) * whole
    total = rows.sum(1, keepdim=True)
    return rows * whole.sum(1, keepdim=True) / total.where(total > 0, 1.0)


def row_map(kind: StateKind, weights: Tensor, valid: Tensor) -> Tensor:
    """What states of ``kind`` [b, n, h] are multiplied with: A [b, n, n].

    ``weights`` of tokens [b, m], at least 0; ``valid`` bool [b, m].
    """
    rows = _of_rows(kind, weights, valid)
    scaling = rows.sqrt().diag_embed()
    if not kind.centred:
        return scaling
    # (I - 1 w^T), then the roots: row i of the product is sqrt(w_i) (e_i - w)^T.
    share = rows / rows.sum(1, keepdim=True).clamp(min=1)
    return scaling - rows.sqrt()[:, :, None] * share[:, None, :]


class WeightedEnds:
    """One model's ends at a layer, as terms see them under ``maps`` [b, n, n] by kind."""

    def __init__(self, ends: Ends, maps: dict[str, Tensor]) -> None:
        self._ends, self._maps = ends, maps

    def states(self, kind: str) -> Tensor:
        """[b, n, h]."""
        states = self._ends.states(kind)
        return self._maps[kind].to(states.dtype) @ states

    def products(self, kind: str, over: str) -> Tensor:
        """[b, n, n]."""
        products = self._ends.products(kind, over)
        rows = self._maps[kind].to(products.dtype)
        return rows @ products @ rows.mT


def counted(weights: Tensor, valid: Tensor) -> Tensor:
    """``valid`` bool [b, m], False for a window whose tokens all weigh nothing."""
    return valid & (valid & (weights > 0)).any(1, keepdim=True)
