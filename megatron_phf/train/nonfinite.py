"""Skip a step whose loss or gradient is not finite, its samples on disk; stop after several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import write_jsonl
from megatron_phf.data.rollouts import Rollout, rollout_to_json
from megatron_phf.files.replace import free_number
from megatron_phf.runtime import device, parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.logging import say
from megatron_phf.train.metrics import OutputLoss


class NonfiniteSteps:
    """Counts the steps that were skipped: all of the run, and the last ones in a row."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.total = self.in_a_row = 0

    def must_skip(
        self,
        iteration: int,
        rollouts: Sequence[Rollout],
        outputs: Sequence[OutputLoss],
        values: Mapping[tuple[int, int], Tensor],
        gradients_finite: Tensor,
        order: Sequence[Sequence[int]],
    ) -> bool:
        """Whether the weights must not change; after each backward pass, on every rank alike.

        ``gradients_finite``: bool []; ``order``: the number of the rollout in each row of each
        microbatch.  Reads one number of the device for all, and more only for what it then reports.

        Raises:
            ValueError: as many in a row as --max-consecutive-nonfinite-steps; names the step and
                the file with its samples.
        """
        flags = torch.stack([~_all_finite(outputs, values), ~gradients_finite]).float()
        loss_bad, gradient_bad = parallel.max_of_tensor(flags)
        if not loss_bad and not gradient_bad:
            self.in_a_row = 0
            return False
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        what = "loss" if loss_bad else "gradient"
        # A gradient names no sample: the whole batch is written then.
        every = set(range(len(rollouts)))
        named = _bad_sequences(outputs, values, order) if loss_bad else every
        where = _dump(iteration, rollouts, named, self._config)
        limit = self._config.checkpoint.max_consecutive_nonfinite_steps
        text = f"step {iteration}: the {what} is not finite; weights unchanged, {where} "
        if self.in_a_row >= limit:
            raise ValueError(
                f"{text}(replay them with --rollout-engine replay --replay-file; try a lower --lr "
                f"or --clip-grad); {self.in_a_row} in a row, --max-consecutive-nonfinite-steps "
                f"{limit}"
            )
        say(f"warning: {text}({self.in_a_row} in a row)")
        return True


def _all_finite(outputs: Sequence[OutputLoss], values: Mapping[Any, Tensor]) -> Tensor:
    """Whether every term here is finite: bool [], on the device."""
    terms = [output.per_token for output in outputs] + [term.flatten() for term in values.values()]
    empty = torch.zeros(1, device=device.device())
    return torch.cat([empty, *terms]).isfinite().all()


def _bad_sequences(
    outputs: Sequence[OutputLoss],
    values: Mapping[tuple[int, int], Tensor],
    order: Sequence[Sequence[int]],
) -> set[int]:
    """Numbers, within this rank's batch, of the sequences with a term that is not finite here."""
    bad: set[int] = set()
    for microbatch, output in enumerate(outputs):
        rows = output.sequence[~output.per_token.isfinite().cpu()].tolist()
        bad |= {order[microbatch][row] for row in rows}
    for (microbatch, _), terms in values.items():
        rows = (~terms.isfinite()).any(0).nonzero().flatten().tolist()
        bad |= {order[microbatch][row] for row in rows}
    return bad


def _dump(iteration: int, rollouts: Sequence[Rollout], bad: set[int], config: Config) -> str:
    """Write the samples named by any rank, as a replay file; where they are; collective."""
    rank = parallel.data_parallel_rank()
    mine = {(rank, i): rollout_to_json(rollouts[i], log_probs=True) for i in sorted(bad)}
    samples = {k: sample for rank in parallel.gather_objects(mine) for k, sample in rank.items()}
    return on_first_rank(_write, iteration, [samples[key] for key in sorted(samples)], config)


def _write(iteration: int, samples: list[dict], config: Config) -> str:
    path = os.path.join(config.output.output_dir, f"nonfinite_step_{iteration}.jsonl")
    if os.path.exists(path):  # an earlier run's, which this one may replay
        path = f"{path}.{free_number([path])}"
    try:
        os.makedirs(config.output.output_dir, exist_ok=True)
        write_jsonl(path, samples)
    except OSError as error:
        return f"samples not written ({path}: {error.strerror})"
    return f"samples in {path}"
