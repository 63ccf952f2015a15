"""Stop at a loss or gradient that is not finite, with the samples it came from on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from megatron_phf import parallel
from megatron_phf.config import Config
from megatron_phf.data.problems import write_jsonl
from megatron_phf.data.replay_file import Rollout, rollout_to_json

if TYPE_CHECKING:
    from megatron_phf.train.step import OutputLoss


def _bad_sequences(
    outputs: Sequence[OutputLoss], values: Mapping[tuple[int, int], Tensor], micro_batch_size: int
) -> set[int]:
    """Numbers, within this rank's batch, of the sequences with a term that is not finite here."""
    bad: set[int] = set()
    for microbatch, output in enumerate(outputs):
        rows = output.sequence[~output.per_token.isfinite()].tolist()
        bad |= {microbatch * micro_batch_size + row for row in rows}
    for (microbatch, _), terms in values.items():
        rows = (~terms.isfinite()).any(0).nonzero().flatten().tolist()
        bad |= {microbatch * micro_batch_size + row for row in rows}
    return bad


def _dump(iteration: int, rollouts: Sequence[Rollout], bad: set[int], config: Config) -> str:
    """Write the samples named by any rank, as a replay file; collective."""
    mine = {(parallel.data_parallel_rank(), i): rollout_to_json(rollouts[i]) for i in sorted(bad)}
    gathered: list[dict[tuple[int, int], Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    samples = {key: sample for rank in gathered for key, sample in rank.items()}
    path = os.path.join(config.output.output_dir, f"nonfinite_step_{iteration}.jsonl")
    if parallel.is_first_rank():
        os.makedirs(config.output.output_dir, exist_ok=True)
        write_jsonl(path, [samples[key] for key in sorted(samples)])
    return path


def stop_if_nonfinite(
    iteration: int,
    rollouts: Sequence[Rollout],
    outputs: Sequence[OutputLoss],
    values: Mapping[tuple[int, int], Tensor],
    gradients_finite: bool,
    config: Config,
) -> None:
    """Every rank calls it after the backward pass, before the weights change.

    Raises:
        ValueError: on every rank alike, naming the step and the file with the samples.
    """
    bad = _bad_sequences(outputs, values, config.train.micro_batch_size)
    loss_bad = parallel.any_rank(bool(bad))
    if not loss_bad and not parallel.any_rank(not gradients_finite):
        return
    what = "loss" if loss_bad else "gradient"
    # A gradient names no sample: the whole batch is written then.
    path = _dump(iteration, rollouts, bad if loss_bad else set(range(len(rollouts))), config)
    raise ValueError(
        f"step {iteration}: the {what} is not finite; weights unchanged, samples in {path} "
        "(replay them with --rollout-engine replay --replay-file; try a lower --lr or --clip-grad)"
    )
