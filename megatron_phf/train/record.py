"""Rollouts that are also written down, for a replay (``--record-rollouts``)."""

from __future__ import annotations

import os

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import keep_lines
from megatron_phf.data.rollouts import Rollout, is_rollout, rollout_to_json
from megatron_phf.files.appended import AppendedLines
from megatron_phf.rollout.sources import RolloutSource
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train.hooks import RunHook
from megatron_phf.train.logging import say


class RecordingSource(RunHook):
    """Another source, every rollout of which is also appended to a replay file.

    With log-probabilities where a replay weighs tokens by them.
    """

    def __init__(self, source: RolloutSource, path: str, config: Config, done: int) -> None:
        """A resumed run keeps the rollouts of its first ``done`` steps."""
        self._source, self._path = source, path
        self._log_probs = config.method.importance_ratio_cap is not None
        self._lines = AppendedLines(path, "--record-rollouts")
        on_first_rank(self._begin, done * config.train.global_batch_size)

    def _begin(self, kept: int) -> None:
        os.makedirs(os.path.dirname(os.path.realpath(self._path)), exist_ok=True)
        keep_lines(self._path, lambda number, line: number <= kept, is_rollout)

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        local = self._source.rollouts(iteration)
        lines = [rollout_to_json(rollout, self._log_probs) for rollout in local]
        shares = parallel.gather_over_data_parallel(lines)
        if parallel.is_first_rank() and (
            warning := self._lines.add(line for share in shares for line in share)
        ):
            say(warning)
        return local

    def at_end(self, iteration: int, stopped: bool) -> str | None:
        """Lines that the disk has not taken in the end are an error, once all else is saved."""
        return on_first_rank(self._lines.last_problem)
