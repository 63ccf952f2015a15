"""Which rollouts are trained on: all, or those whose answers the run's grader calls so."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.evaluation.grading import make_grader
from megatron_phf.rollout.context import Prompts
from megatron_phf.rollout.order import problem_order
from megatron_phf.rollout.sources import RolloutSource
from megatron_phf.runtime import parallel
from megatron_phf.train.hooks import RunHook


class GradedSource(RunHook):
    """Another source, whose rollouts are kept where their verdict is the wanted one.

    Those that are not stay in their places, so that every rank has as many microbatches as before;
    their responses are in no batch (``Rollout.trained``).
    """

    def __init__(self, source: RolloutSource, config: Config, prompts: Prompts) -> None:
        self._source, self._wanted = source, config.rollout.keep_rollouts == "correct"
        self._order, self._tokenizer = problem_order(config, prompts.pairs), prompts.tokenizer
        self._closing = contextlib.ExitStack()
        self._grader = self._closing.enter_context(make_grader(config.evaluation.grader))

    def close(self) -> None:
        """End the grader's process."""
        self._closing.close()

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        local = self._source.rollouts(iteration)
        # Once for each copy of the model: a grader that runs out of time may do so on one alone.
        asks = parallel.decides_for_model()
        verdicts = parallel.share_object(self._verdicts(iteration, local) if asks else [])
        return [
            dataclasses.replace(rollout, kept=verdict == self._wanted)
            for rollout, verdict in zip(local, verdicts, strict=True)
        ]

    def _verdicts(self, iteration: int, local: Sequence[Rollout]) -> list[bool]:
        _, pairs = self._order.share(iteration)
        return [
            self._grader.correct(self._tokenizer.decode(rollout.response_ids), pair.problem)
            for rollout, pair in zip(local, pairs, strict=True)
        ]
