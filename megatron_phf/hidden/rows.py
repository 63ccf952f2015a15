"""Rows of a hidden state at chosen positions, whole or sharded along the sequence.

Context parallelism cuts a sequence into 2 x CP chunks; rank r holds chunks r and 2 CP - 1 - r, one
behind the other (megatron's zig-zag order, which gives causal attention equal work).  Of a packed
row it cuts each sequence alike, and rank r holds its two chunks of the first, then those of the
second, and so on (the order of Transformer Engine's ``thd_get_partitioned_indices``).  Sequence
parallelism cuts that part again, into TP contiguous pieces.

``cu_seqlens`` below, int [n + 1]: where the n sequences of a packed row start, and its length;
None: rows are sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
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
        """Rows are padded to a multiple of this."""
        aligned = math.lcm(self.chunks, self.alignment * self.context_size)
        return aligned * self.sequence_size

    def multiple_with(self, tokens: int) -> int:
        """As ``length_multiple``, with a context part that is a multiple of ``tokens``, too."""
        return math.lcm(self.length_multiple, tokens * self.context_size)

    @property
    def chunks(self) -> int:
        """Into how many chunks of equal length context parallelism cuts a sequence."""
        return 1 if self.context is None else 2 * self.context_size

    def part(self, whole: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[b, s] -> this context rank's tokens [b, s / CP], what the model gets."""
        if self.context is None:
            return whole
        limits = [0, whole.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        size, rank = self.context_size, self.context.rank()
        positions = [a + context_positions(b - a, size, rank) for a, b in pairwise(limits)]
        return whole[:, torch.cat(positions).to(whole.device)]

    def piece(self, whole: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[b, s] -> what a layer of this process holds, [b, s_local]."""
        part = self.part(whole, cu_seqlens)
        if self.sequence is None:
            return part
        return part.chunk(self.sequence_size, dim=1)[self.sequence.rank()]

    def in_part(
        self, positions: Tensor, length: int, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Absolute positions in rows of ``length`` -> their index here, whether they are here.

        The index means nothing where they are not in this context rank's part.
        """
        if self.context is None:
            return positions, torch.ones_like(positions, dtype=torch.bool)
        size, rank = self.context_size, self.context.rank()
        start: Tensor | int = 0
        width: Tensor | int = length
        if cu_seqlens is not None:
            limits = cu_seqlens.to(positions.dtype)
            # A window without tokens, behind the last prompt, may lie one behind the row's end.
            sequence = torch.bucketize(positions, limits[1:-1], right=True)
            start, width = limits[sequence], limits.diff()[sequence]
        width = width // self.chunks
        chunk = (positions - start) // width
        second = chunk == 2 * size - 1 - rank
        index = start // size + (positions - start) % width + width * second
        return index, second | (chunk == rank)

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


def gather_rows(
    hidden: Tensor, positions: Tensor, shards: SequenceShards, cu_seqlens: Tensor | None = None
) -> Tensor:
    """hidden [s_local, b, h], positions [b, m] in the whole padded row -> [b, m, h].

    Equal on all ranks of ``shards``.  Under context parallelism a loss of these rows gives each
    rank the gradient through its own tokens alone: summed over the ranks, each counts once.
    """
    s_local = hidden.shape[0]
    length = s_local * shards.sequence_size * shards.context_size
    index, here = shards.in_piece(*shards.in_part(positions, length, cu_seqlens), s_local)
    return _GatherRows.apply(hidden, index, here, shards.sequence, shards.context)


def part_rows(
    hidden: Tensor, positions: Tensor, shards: SequenceShards, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`gather_rows`, for the positions of this context rank's part alone.

    Returns rows [b, m, h] and ``mine`` bool [b, m]: where False, another context rank has the row.
    """
    s_local = hidden.shape[0]
    length = s_local * shards.sequence_size * shards.context_size
    index, mine = shards.in_part(positions, length, cu_seqlens)
    index, here = shards.in_piece(index, mine, s_local)
    return _GatherRows.apply(hidden, index, here, shards.sequence, None), mine
