"""Which rollouts are trained on: all, or those whose answers the run's grader calls so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from megatron_phf.data.rollouts import Rollout
from megatron_phf.evaluation.grading import Grader
from megatron_phf.rollout.order import ProblemOrder
from megatron_phf.rollout.sources import RolloutSource
from megatron_phf.runtime import parallel


class GradedSource:
    """Another source, whose rollouts are kept where their verdict is the wanted one.

    Those that are not stay in their places, so that every rank has as many microbatches as before;
    their responses are in no batch (``Rollout.trained``).
    """

    def __init__(
        self,
        source: RolloutSource,
        order: ProblemOrder,
        decode: Callable[[Sequence[int]], str],
        grader: Grader,
        wanted: bool,
    ) -> None:
        """``order``: that of ``source``; ``decode``: token ids to what is graded."""
        self._source, self._order, self._decode = source, order, decode
        self._grader, self._wanted = grader, wanted

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
            self._grader.correct(self._decode(rollout.response_ids), pair.problem)
            for rollout, pair in zip(local, pairs, strict=True)
        ]
