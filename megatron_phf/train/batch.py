"""A step's rollouts as microbatches of this data-parallel rank, on the device.

Whatever depends on lengths and masks is worked out on the host, and goes to the device with the
tokens, in copies that nobody waits for: no layer and no loss has to ask the device for a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_names
from megatron_phf.data.batch import SequenceBatch, flow_window, make_sequences, token_counts
from megatron_phf.data.microbatches import (
    groups_under_budget,
    packed_tokens,
    padded_tokens,
    round_up,
    split_into,
)
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden.rows import RowPlaces, SequenceShards
from megatron_phf.hidden.targets import FlowWindow
from megatron_phf.model.userbuffers import fixed_row_length
from megatron_phf.runtime import device, parallel
from megatron_phf.train.by_teacher import numbers_by_teacher


@dataclass(frozen=True)
class PlacedBatch:
    """A :class:`SequenceBatch` as this process reads it: on the device, but for what says host.

    N of its tokens are scored, n of them by outputs of this context rank.  tokens [b, s / CP];
    ``shape``: (b, s); padding [b, s_local]: as a layer holds it; ``window`` [b, m] and
    ``window_valid`` bool [b, m]; ``scored`` [N]: the outputs that predict the scored tokens;
    ``own`` [n]: those of this context rank, ``kept`` int64 [n]: which of the N they are, or None
    where all; ``targets`` int64 [n]: the tokens; ``sequence`` int64 [n], host: their rows;
    ``log_probs`` fp64 [n] or None; ``cu_seqlens`` int32, host, and ``max_seqlen``: see
    :class:`SequenceBatch`; ``responses`` bool [b, r], host: which response tokens are scored;
    ``window_tokens`` int64 [b, m], host: which of them the window's are.
    """

    tokens: Tensor
    shape: torch.Size
    padding: Tensor
    window: RowPlaces
    window_valid: Tensor
    scored: RowPlaces
    own: RowPlaces
    kept: Tensor | None
    targets: Tensor
    sequence: Tensor
    log_probs: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    responses: Tensor
    window_tokens: Tensor


@dataclass(frozen=True)
class StepBatch:
    """This data-parallel rank's microbatches of one step, as student and as teacher read them.

    ``num_tokens``: those that are scored; ``num_sequences``: rollouts that are kept; ``order``: the
    number of the rollout in each row of each microbatch; ``token_counts``: tokens that both models
    read, without and with padding; ``teacher_names``: of each microbatch's, where teachers have
    names; those of one follow one another.
    """

    students: list[PlacedBatch]
    teachers: list[PlacedBatch]
    num_tokens: int
    num_sequences: int
    order: list[list[int]]
    token_counts: tuple[int, int]
    teacher_names: list[str]


def place(batch: SequenceBatch, shards: SequenceShards) -> PlacedBatch:
    """``batch``, from the host, as this process reads it."""
    shape, limits, move = batch.tokens.shape, batch.cu_seqlens, device.from_host
    response = batch.scored.flatten().nonzero()[:, 0]
    sequence = response // max(1, batch.scored.shape[1])
    row = sequence if limits is None else 0
    index, mine = shards.in_part(batch.predicting[batch.scored], shape[1], limits)
    kept = mine.nonzero()[:, 0]
    own_row = row if isinstance(row, int) else row[kept]
    window = shards.in_part(batch.window, shape[1], limits)
    window_row = torch.arange(shape[0])[:, None] if limits is None else 0
    log_probs = batch.log_probs
    return PlacedBatch(
        tokens=move(shards.part(batch.tokens, limits)),
        shape=shape,
        padding=move(shards.piece(batch.padding, limits).contiguous()),
        window=shards.places(*window, window_row, shape).moved(move),
        window_valid=move(batch.window_valid),
        scored=shards.places(index, mine, row, shape).moved(move),
        own=shards.places(index[kept], mine[kept], own_row, shape).moved(move),
        kept=None if len(kept) == len(mine) else move(kept),
        targets=move(batch.target_ids()[kept]),
        sequence=sequence[kept],
        log_probs=None if log_probs is None else move(log_probs.flatten()[response[kept]]),
        cu_seqlens=limits,
        max_seqlen=batch.max_seqlen,
        responses=batch.scored,
        window_tokens=batch.window_tokens(),
    )


def make_batch(rollouts: Sequence[Rollout], config: Config, shards: SequenceShards) -> StepBatch:
    """Microbatches of both models' sequences; every data-parallel rank calls it.

    ``shards``: how this process's layers see a sequence.
    """
    method, names = config.method, teacher_names(config)
    by_teacher = numbers_by_teacher(rollouts, names)
    places = [i for numbers in by_teacher for i in numbers]
    rollouts = [rollouts[i].trained() for i in places]
    rollouts = [r.skipping(method.skip_first_tokens) for r in rollouts]
    budget, size = config.batching.max_tokens_per_microbatch, config.train.micro_batch_size
    order = [list(range(start, start + size)) for start in range(0, len(rollouts), size)]
    if budget:
        order = _under_budget(rollouts, [len(numbers) for numbers in by_teacher], config, shards)
    students, teachers = make_sequences(
        rollouts,
        order,
        flow_window(method.phf_window_size, method.phf_window_rule),
        equal_lengths=not budget,
        length_multiple=_row_multiple(config, shards),
        sequence_multiple=shards.chunks,
        packed=config.batching.pack_sequences,
        row_length=fixed_row_length(config, shards.length_multiple),
    )
    return StepBatch(
        [place(batch, shards) for batch in students],
        [place(batch, shards) for batch in teachers],
        sum(sum(r.scored) for r in rollouts),
        sum(r.kept for r in rollouts),
        [[places[i] for i in rows] for rows in order],
        token_counts([*students, *teachers]),
        [rollouts[rows[0]].teacher or names[0] for rows in order] if names else [],
    )


def flow_windows(
    batches: Sequence[PlacedBatch],
    scale: float = 0.0,
    weights: Sequence[Tensor] | None = None,
) -> list[FlowWindow]:
    """The flow loss's window in each microbatch; ``scale``: see ``FlowWindow.gradient_scale``.

    ``weights`` [b, m]: of each microbatch's window, None where all tokens count the same.
    """
    given: Sequence[Tensor | None] = [None] * len(batches) if weights is None else weights
    return [
        FlowWindow(b.window, b.window_valid, scale, w) for b, w in zip(batches, given, strict=True)
    ]


def _row_multiple(config: Config, shards: SequenceShards) -> int:
    """Packed rows differ in their sequences anyway: they have no padding but what they need."""
    packed = config.batching.pack_sequences
    return shards.multiple_with(1 if packed else device.row_multiple())


def _under_budget(
    rollouts: Sequence[Rollout], runs: Sequence[int], config: Config, shards: SequenceShards
) -> list[list[int]]:
    """The microbatches under --max-tokens-per-microbatch, none over the end of a run of ``runs``.

    As many on every data-parallel rank: experts wait for tokens of all of them.
    """
    budget = config.batching.max_tokens_per_microbatch
    multiple, tokens = _row_multiple(config, shards), padded_tokens
    if config.batching.pack_sequences:  # all else that is padded is the row
        multiple, tokens = shards.chunks, packed_tokens

    def padded(prompt: Sequence[int], response: Sequence[int]) -> int:
        return round_up(len(prompt) + len(response), multiple)

    lengths = [
        (padded(r.student_prompt_ids, r.response_ids), padded(r.teacher_prompt_ids, r.response_ids))
        for r in rollouts
    ]
    groups: list[list[int]] = []
    for end, run in zip(accumulate(runs), runs, strict=True):
        own = groups_under_budget(lengths[end - run : end], budget, tokens)
        groups += [[end - run + i for i in group] for group in own]
    number = max(parallel.gather_over_data_parallel(len(groups)))
    return split_into(groups, number, lengths, tokens)
