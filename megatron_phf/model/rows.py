"""Rows of a hidden state at chosen positions, whole or sharded along the sequence.

Context parallelism cuts a sequence into 2 x CP chunks; rank r holds chunks r and 2 CP - 1 - r, one
behind the other (megatron's zig-zag order, which gives causal attention equal work).  Sequence
parallelism cuts that part again, into TP contiguous pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def context_positions(length: int, size: int, rank: int) -> Tensor:
    """Absolute positions, int64 [length / size], of the tokens of context rank ``rank``."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[-1 - rank]))


@dataclass(frozen=True)
class SequenceShards:
    """The groups over which sequences are sharded, or None where they are whole.

    ``alignment``: what the tokens of a sequence in one process must be a multiple of.
    """

    context: dist.ProcessGroup | None = None  # context parallelism
    sequence: dist.ProcessGroup | None = None  # sequence parallelism, within a context part
    alignment: int = 1

    @property
    def context_size(self) -> int:
        """Into how many parts context parallelism cuts a sequence."""
        return 1 if self.context is None else self.context.size()

    @property
    def sequence_size(self) -> int:
        """Into how many pieces sequence parallelism cuts each part."""
        return 1 if self.sequence is None else self.sequence.size()

    @property
    def length_multiple(self) -> int:
        """Sequences are padded to a multiple of this."""
        chunks = 1 if self.context is None else 2 * self.context_size
        return math.lcm(chunks, self.alignment * self.context_size) * self.sequence_size

    def part(self, whole: Tensor) -> Tensor:
        """[b, s] -> this context rank's tokens [b, s / CP], what the model gets."""
        if self.context is None:
            return whole
        positions = context_positions(whole.shape[1], self.context_size, self.context.rank())
        return whole[:, positions.to(whole.device)]

    def piece(self, whole: Tensor) -> Tensor:
        """[b, s] -> what a layer of this process holds, [b, s_local]."""
        part = self.part(whole)
        if self.sequence is None:
            return part
        return part.chunk(self.sequence_size, dim=1)[self.sequence.rank()]

    def in_part(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Absolute positions in sequences of ``length`` -> (index in this context rank's part,

        whether they are there); the index means nothing where they are not.
        """
        if self.context is None:
            return positions, torch.ones_like(positions, dtype=torch.bool)
        size, rank = self.context_size, self.context.rank()
        width = length // (2 * size)
        chunk = positions // width
        second = chunk == 2 * size - 1 - rank
        return positions % width + width * second, second | (chunk == rank)

    def in_piece(self, index: Tensor, here: Tensor, s_local: int) -> tuple[Tensor, Tensor]:
        """The result of :meth:`in_part` -> (index in this process's piece, whether it is there)."""
        if self.sequence is not None:
            index = index - self.sequence.rank() * s_local
        here = here & (index >= 0) & (index < s_local)
        return index.clamp(0, s_local - 1), here


class _GatherRows(torch.autograd.Function):
    """hidden [s_local, b, h], index and here [b, m] -> rows [b, m, h], equal on all ranks.

    Each rank fills in the rows that it holds and the sum over the groups completes them: m rows
    travel, never the sequence.  All ranks then compute the same loss from the same rows, so each
    already has the whole gradient of its own rows, and backward needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, here: Tensor, *groups: Any) -> Tensor:
        batch = torch.arange(hidden.shape[1], device=hidden.device)[:, None]
        rows = hidden[index, batch] * here[..., None]
        for group in groups:
            if group is not None:
                dist.all_reduce(rows, group=group)
        ctx.save_for_backward(index, here)
        ctx.shape = hidden.shape
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, here = ctx.saved_tensors
        grad = grads[0].new_zeros(ctx.shape)
        batch = torch.arange(ctx.shape[1], device=index.device)[:, None].expand_as(index)
        # Accumulate: the padding of a short window repeats a position (with gradient zero).
        grad.index_put_((index, batch), grads[0] * here[..., None], accumulate=True)
        return grad, None, None, None, None


def gather_rows(hidden: Tensor, positions: Tensor, shards: SequenceShards) -> Tensor:
    """hidden [s_local, b, h], positions [b, m] in the whole padded sequence -> [b, m, h].

    Equal on all ranks of ``shards``.  Under context parallelism a loss of these rows gives each
    rank the gradient through its own tokens alone: summed over the ranks, each counts once.
    """
    s_local = hidden.shape[0]
    length = s_local * shards.sequence_size * shards.context_size
    index, here = shards.in_piece(*shards.in_part(positions, length), s_local)
    return _GatherRows.apply(hidden, index, here, shards.sequence, shards.context)


def part_rows(hidden: Tensor, positions: Tensor, shards: SequenceShards) -> tuple[Tensor, Tensor]:
    """As :func:`gather_rows`, for the positions of this context rank's part alone.

    Returns rows [b, m, h] and ``mine`` bool [b, m]: where False, another context rank has the row.
    """
    s_local = hidden.shape[0]
    length = s_local * shards.sequence_size * shards.context_size
    index, mine = shards.in_part(positions, length)
    index, here = shards.in_piece(index, mine, s_local)
    return _GatherRows.apply(hidden, index, here, shards.sequence, None), mine
