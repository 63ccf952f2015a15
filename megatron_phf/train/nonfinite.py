"""Skip a step whose loss or gradient is not finite, its samples on disk; stop after several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import write_jsonl
from megatron_phf.data.rollouts import Rollout, rollout_to_json
from megatron_phf.files.replace import free_number
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
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
        gradients_finite: bool,
        order: Sequence[Sequence[int]],
    ) -> bool:
        """Whether the weights must not change; after each backward pass, on every rank alike.

        ``order``: the number of the rollout in each row of each microbatch.

        Raises:
            ValueError: as many in a row as --max-consecutive-nonfinite-steps; names the step and
                the file with its samples.
        """
        bad = _bad_sequences(outputs, values, order)
        loss_bad, gradient_bad = parallel.max_over_ranks([bool(bad), not gradients_finite])
        if not loss_bad and not gradient_bad:
            self.in_a_row = 0
            return False
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        what = "loss" if loss_bad else "gradient"
        # A gradient names no sample: the whole batch is written then.
        named = bad if loss_bad else set(range(len(rollouts)))
        path = _dump(iteration, rollouts, named, self._config)
        limit = self._config.checkpoint.max_consecutive_nonfinite_steps
        text = f"step {iteration}: the {what} is not finite; weights unchanged, samples in {path} "
        if self.in_a_row >= limit:
            raise ValueError(
                f"{text}(replay them with --rollout-engine replay --replay-file; try a lower --lr "
                f"or --clip-grad); {self.in_a_row} in a row, --max-consecutive-nonfinite-steps "
                f"{limit}"
            )
        if parallel.is_first_rank():
            print(f"warning: {text}({self.in_a_row} in a row)", flush=True)
        return True


def _bad_sequences(
    outputs: Sequence[OutputLoss],
    values: Mapping[tuple[int, int], Tensor],
    order: Sequence[Sequence[int]],
) -> set[int]:
    """Numbers, within this rank's batch, of the sequences with a term that is not finite here."""
    bad: set[int] = set()
    for microbatch, output in enumerate(outputs):
        rows = output.sequence[~output.per_token.isfinite()].tolist()
        bad |= {order[microbatch][row] for row in rows}
    for (microbatch, _), terms in values.items():
        rows = (~terms.isfinite()).any(0).nonzero().flatten().tolist()
        bad |= {order[microbatch][row] for row in rows}
    return bad


def _dump(iteration: int, rollouts: Sequence[Rollout], bad: set[int], config: Config) -> str:
    """Write the samples named by any rank, as a replay file; collective."""
    mine = {(parallel.data_parallel_rank(), i): rollout_to_json(rollouts[i]) for i in sorted(bad)}
    samples = {k: sample for rank in parallel.gather_objects(mine) for k, sample in rank.items()}
    return on_first_rank(_write, iteration, [samples[key] for key in sorted(samples)], config)


def _write(iteration: int, samples: list[dict], config: Config) -> str:
    path = os.path.join(config.output.output_dir, f"nonfinite_step_{iteration}.jsonl")
    os.makedirs(config.output.output_dir, exist_ok=True)
    if os.path.exists(path):  # an earlier run's, which this one may replay
        path = f"{path}.{free_number([path])}"
    write_jsonl(path, samples)
    return path
