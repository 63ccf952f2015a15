"""A step's rollouts as microbatches of this data-parallel rank, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_phf.config.settings import Config
from megatron_phf.data.batch import LocalBatch, SequenceBatch, flow_window, make_local_batch
from megatron_phf.data.microbatches import (
    groups_under_budget,
    packed_tokens,
    padded_tokens,
    round_up,
    split_into,
)
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden.rows import SequenceShards
from megatron_phf.hidden.tap import FlowWindow
from megatron_phf.model.userbuffers import fixed_row_length
from megatron_phf.runtime import device, parallel


def make_batch(rollouts: Sequence[Rollout], config: Config, shards: SequenceShards) -> LocalBatch:
    """Microbatches of both models' sequences; every data-parallel rank calls it.

    ``shards``: how this process's layers see a sequence.
    """
    method, where = config.method, device.device()
    rollouts = [rollout.trained() for rollout in rollouts]
    batch = make_local_batch(
        rollouts,
        config.train.micro_batch_size,
        flow_window(method.phf_window_size, method.phf_window_rule),
        length_multiple=_row_multiple(config, shards),
        sequence_multiple=shards.chunks,
        groups=_groups(rollouts, config, shards),
        packed=config.batching.pack_sequences,
        row_length=fixed_row_length(config, shards.length_multiple),
    )
    moved = [type(m)(m.student.to(where), m.teacher.to(where)) for m in batch.microbatches]
    return dataclasses.replace(batch, microbatches=moved)


def flow_windows(batches: Sequence[SequenceBatch], scale: float = 0.0) -> list[FlowWindow]:
    """The flow loss's window in each microbatch; ``scale``: see ``FlowWindow.gradient_scale``."""
    return [FlowWindow(b.window, b.window_valid, scale, b.cu_seqlens) for b in batches]


def _row_multiple(config: Config, shards: SequenceShards) -> int:
    """Packed rows differ in their sequences anyway: they have no padding but what they need."""
    packed = config.batching.pack_sequences
    return shards.multiple_with(1 if packed else device.row_multiple())


def _groups(
    rollouts: Sequence[Rollout], config: Config, shards: SequenceShards
) -> list[list[int]] | None:
    """The microbatches under --max-tokens-per-microbatch.

    As many on every data-parallel rank: experts wait for tokens of all of them.
    """
    budget = config.batching.max_tokens_per_microbatch
    if budget == 0:
        return None
    multiple, tokens = _row_multiple(config, shards), padded_tokens
    if config.batching.pack_sequences:  # all else that is padded is the row
        multiple, tokens = shards.chunks, packed_tokens

    def padded(prompt: Sequence[int], response: Sequence[int]) -> int:
        return round_up(len(prompt) + len(response), multiple)

    lengths = [
        (padded(r.student_prompt_ids, r.response_ids), padded(r.teacher_prompt_ids, r.response_ids))
        for r in rollouts
    ]
    groups = groups_under_budget(lengths, budget, tokens)
    number = max(parallel.gather_over_data_parallel(len(groups)))
    return split_into(groups, number, lengths, tokens)
