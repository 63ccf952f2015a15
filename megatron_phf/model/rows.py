"""Rows of a hidden state at chosen positions, whole or sharded along the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """hidden [s_local, b, h], positions [b, m] -> rows [b, m, h], equal on all ranks of ``group``.

    Each rank fills in the rows that it holds and the sum over the group completes them: m rows
    travel, never the sequence.  All ranks then compute the same loss from the same rows, so each
    already has the whole gradient of its own rows, and backward needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor, group: Any) -> Tensor:
        s_local = hidden.shape[0]
        local = positions - (dist.get_rank(group) * s_local if group is not None else 0)
        inside = (local >= 0) & (local < s_local)
        local = local.clamp(0, s_local - 1)
        batch = torch.arange(hidden.shape[1], device=hidden.device)[:, None]
        rows = hidden[local, batch]
        if group is not None:
            rows = rows * inside[..., None]
            dist.all_reduce(rows, group=group)
        ctx.save_for_backward(local, inside)
        ctx.shape = hidden.shape
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        local, inside = ctx.saved_tensors
        grad = grads[0].new_zeros(ctx.shape)
        batch = torch.arange(ctx.shape[1], device=local.device)[:, None].expand_as(local)
        # Accumulate: the padding of a short window repeats a position (with gradient zero).
        grad.index_put_((local, batch), grads[0] * inside[..., None], accumulate=True)
        return grad, None, None


def gather_rows(hidden: Tensor, positions: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """hidden [s, b, h] (or this rank's part of the sequence), positions [b, m] -> [b, m, h].

    Args:
        positions: absolute positions in the whole padded sequence.
        group: the group over which the sequence is sharded (sequence parallelism), or None.
    """
    return _GatherRows.apply(hidden, positions, group)
