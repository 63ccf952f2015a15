"""Rows of a hidden state at chosen positions, whole or sharded along the sequence.

Context parallelism cuts a sequence into 2 x CP chunks; rank r holds chunks r and 2 CP - 1 - r, one
behind the other (megatron's zig-zag order, which gives causal attention equal work).  Of a packed
row it cuts each sequence alike, and rank r holds its two chunks of the first, then those of the
second, and so on (the order of Transformer Engine's ``thd_get_partitioned_indices``).  Sequence
parallelism cuts that part again, into TP contiguous pieces.

``cu_seqlens`` below, int [n + 1]: where the n sequences of a packed row start, and its length;
None: rows are sequences.  All of this is computed on the host, once a microbatch: a layer gets
:class:`RowPlaces`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
class RowPlaces:
    """Where chosen rows of a hidden state [s_local, b, h] are in this process.

    ``flat`` int64 [...]: their number among its s_local x b rows; ``here`` bool [..., 1]: False
    where another process has the row; None: they are all here.
    """

    flat: Tensor
    here: Tensor | None

    def moved(self, move: Callable[[Tensor], Tensor]) -> RowPlaces:
        """A copy where ``move`` takes tensors."""
        return RowPlaces(move(self.flat), None if self.here is None else move(self.here))


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

    def places(
        self, index: Tensor, here: Tensor, row: Tensor | int, shape: torch.Size
    ) -> RowPlaces:
        """The result of :meth:`in_part` in ``row`` of whole tokens [b, s] -> :class:`RowPlaces`."""
        b, s = shape
        index, here = self.in_piece(index, here, s // self.context_size // self.sequence_size)
        sharded = self.context is not None or self.sequence is not None
        return RowPlaces(index * b + row, here[..., None] if sharded else None)

    def in_piece(self, index: Tensor, here: Tensor, s_local: int) -> tuple[Tensor, Tensor]:
        """The result of :meth:`in_part` -> (index in this process's piece, whether it is there)."""
        if self.sequence is not None:
            index = index - self.sequence.rank() * s_local
        here = here & (index >= 0) & (index < s_local)
        return index.clamp(0, s_local - 1), here


class _GatherRows(torch.autograd.Function):
    """hidden [s_local, b, h] -> rows [*places, h], equal on all ranks of ``groups``.

    Each rank fills in the rows that it holds and the sum over the groups completes them: m rows
    travel, never the sequence.  All ranks then compute the same loss from the same rows, so each
    already has the whole gradient of its own rows, and backward needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: RowPlaces, *groups: Any) -> Tensor:
        ctx.places, ctx.shape = places, hidden.shape
        return _rows_at(hidden, places, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole = grads[0].new_zeros(ctx.shape)
        return _add_rows(whole, ctx.places, grads[0]), None, None, None


class _WithRows(torch.autograd.Function):
    """hidden [s_local, b, h] -> itself, and rows as :class:`_GatherRows` has them.

    Its gradient is one tensor: what comes back for the hidden states, with the rows' added at their
    places.  Two branches of the graph would each make a whole one, and autograd add them up.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: RowPlaces, *groups: Any) -> tuple[Tensor, Tensor]:
        ctx.places = places
        return hidden.view_as(hidden), _rows_at(hidden, places, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        return _add_rows(whole, ctx.places, grads[1]), None, None, None


def _rows_at(hidden: Tensor, places: RowPlaces, groups: Sequence[Any]) -> Tensor:
    rows = hidden.flatten(0, 1).index_select(0, places.flat.flatten())
    rows = rows.view(*places.flat.shape, hidden.shape[-1])
    if places.here is not None:
        rows = rows * places.here
    for group in groups:
        if group is not None:
            dist.all_reduce(rows, group=group)
    return rows


def _add_rows(whole: Tensor, places: RowPlaces, rows: Tensor) -> Tensor:
    """In place; the padding of a short window repeats a position, and adds zeros there."""
    if places.here is not None:
        rows = rows * places.here
    whole.flatten(0, 1).index_add_(0, places.flat.flatten(), rows.flatten(0, -2))
    return whole


def gather_rows(hidden: Tensor, places: RowPlaces, shards: SequenceShards) -> Tensor:
    """hidden [s_local, b, h] -> rows [*places, h], equal on all ranks of ``shards``.

    Under context parallelism a loss of these rows gives each rank the gradient through its own
    tokens alone: summed over the ranks, each counts once.
    """
    return _GatherRows.apply(hidden, places, shards.sequence, shards.context)


def with_rows(hidden: Tensor, places: RowPlaces, shards: SequenceShards) -> tuple[Tensor, Tensor]:
    """``hidden`` to go on with, and :func:`gather_rows` of it: cheaper where both are used."""
    return _WithRows.apply(hidden, places, shards.sequence, shards.context)


def part_rows(hidden: Tensor, places: RowPlaces, shards: SequenceShards) -> Tensor:
    """As :func:`gather_rows`, for places in this context rank's part alone."""
    return _GatherRows.apply(hidden, places, shards.sequence, None)
