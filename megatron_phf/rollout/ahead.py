"""Rollouts of the next steps, sampled while this one trains (``--max-off-policy-steps``).

Before step t trains, the student's weights go to the engine and the prompts of step t + K are
handed over; step t trains on what was handed over K steps ago.  With K = 1 no response is under way
when the weights are replaced, and a step takes as long as the longer of the two.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.rollout.engines import FLAG
from megatron_phf.rollout.order import ProblemOrder, ResponseRoom, as_rollout, asked
from megatron_phf.rollout.protocol import EngineBeside, Response, WeightsLost
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.shared import asked_once
from megatron_phf.rollout.workers import Workers
from megatron_phf.runtime import parallel

AHEAD = "--max-off-policy-steps"
# Of --distributed-timeout-minutes: what one process may wait while the others wait for it.
_PATIENCE = 0.9
# So often a step is sampled anew because a server was, each time, in the midst of it.
_TIMES_LOST = 5


@dataclass(frozen=True)
class Beside:
    """Of one step: seconds that training waited for rollouts, the share in which both went on."""

    waited: float
    overlap: float


class _Clock:
    """For how long, since it was last asked, at least one sampler ran."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running, self._busy = 0, 0.0
        self._since = self._taken = time.perf_counter()

    def _count(self, change: int) -> None:
        with self._lock:
            self._advance()
            self._running += change

    def _advance(self) -> None:
        now = time.perf_counter()
        self._busy += (now - self._since) * (self._running > 0)
        self._since = now

    def timed(self, sampler: Callable[[], list[Response]]) -> list[Response]:
        self._count(+1)
        try:
            return sampler()
        finally:
            self._count(-1)

    def take(self) -> tuple[float, float]:
        """Those seconds, of so many; what was up to now does not count again."""
        with self._lock:
            self._advance()
            busy, passed = self._busy, self._since - self._taken
            self._busy, self._taken = 0.0, self._since
        return busy, passed


class AheadSource:
    """On-policy rollouts of up to K steps ago; every rank calls each method, in step."""

    def __init__(
        self,
        engine: EngineBeside,
        order: ProblemOrder,
        sampling: SamplingParams,
        room: ResponseRoom,
        config: Config,
    ) -> None:
        self._engine, self._order, self._sampling, self._room = engine, order, sampling, room
        self._steps, self._last = config.rollout.max_off_policy_steps, config.train.train_iters
        self._spec = config.rollout.rollout_engine
        self._patience = 60 * config.parallel.distributed_timeout_minutes * _PATIENCE
        self._workers, self._clock = Workers(self._steps + 1, "rollouts"), _Clock()
        # By step: what is being sampled (None on processes that do not ask), or is there.
        self._pending: dict[int, Future[list[Response]] | None] = {}
        self._there: dict[int, list[Rollout]] = {}
        self._waited, self._trained = 0.0, 0

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``.

        Raises:
            ValueError: they could not be sampled; on every rank.
        """
        self._waited = 0.0
        known = iteration in self._pending or iteration in self._there
        if not known:  # the first step of a run
            self._hand_over(iteration, iteration)
        self._collect(iteration, iteration)
        if known:
            self._hand_over(iteration + 1, iteration)
        self._trained = iteration
        return self._there.pop(iteration)

    def beside(self) -> Beside:
        """Since it was last asked for: a step, behind its rollouts; every rank calls it."""
        busy, passed = self._clock.take()
        share = max(busy - self._waited, 0.0) / passed
        (share,) = parallel.max_over_ranks([share])  # not all of them sample
        return Beside(self._waited, share)

    def _hand_over(self, first: int, version: int) -> None:
        """Let the steps from ``first`` on be sampled by the weights before step ``version``."""
        steps = range(first, min(version + self._steps, self._last) + 1)
        steps_left = [s for s in steps if s not in self._pending and s not in self._there]
        if not steps_left:
            return
        self._engine.prepare(version)
        for step in steps_left:
            self._submit(step)

    def _submit(self, step: int) -> None:
        self._pending[step] = self._sampled(step) if parallel.decides_for_model() else None

    def _sampled(self, step: int) -> Future[list[Response]]:
        sample_ids, pairs = self._order.share(step)
        sampler = self._engine.sampler(*asked(pairs, self._room, self._sampling, sample_ids))
        return self._workers.submit(lambda: self._clock.timed(sampler))

    def _collect(self, step: int, version: int) -> None:
        """Wait for the rollouts of ``step``; ``version``: of the weights that the student has."""
        if step in self._there:
            return
        start = time.perf_counter()
        responses = self._answers(step, version)
        self._waited += time.perf_counter() - start
        pairs = self._order.share(step)[1]
        self._there[step] = [as_rollout(*each) for each in zip(pairs, responses, strict=True)]
        del self._pending[step]

    def _answers(self, step: int, version: int) -> list[Response]:
        """Those of all that asked; where weights were lost amid them, all anew by ``version``'s."""
        for _ in range(_TIMES_LOST):
            future = self._pending[step]
            try:
                return asked_once(functools.partial(self._result, future, step))
            except WeightsLost as error:
                lost = error
            self._engine.prepare(version)
            self._submit(step)
        raise ValueError(
            f"{FLAG} {self._spec}: the rollouts of step {step} were lost {_TIMES_LOST} times, at "
            f"last with: {lost}"
        )

    def _result(self, future: Future[list[Response]] | None, step: int) -> list[Response]:
        assert future is not None, "this process asks"
        try:
            error = future.exception(self._patience)
        except TimeoutError:
            raise ValueError(
                f"{FLAG} {self._spec}: the rollouts of step {step} are not there after waiting for "
                f"{self._patience:.0f} s; raise --distributed-timeout-minutes"
            ) from None
        if isinstance(error, ValueError | WeightsLost):
            raise error
        if error is not None:
            name = type(error).__name__
            raise ValueError(
                f"{FLAG} {self._spec}: sampling beside training failed ({name}: {error})"
            ) from error
        responses = future.result()
        oldest = _oldest(responses)
        if oldest is not None and step - oldest > self._steps:
            raise ValueError(
                f"{FLAG} {self._spec}: a response for step {step} is by the weights of step "
                f"{oldest}, more than {AHEAD} {self._steps} before; its sampler must use those of "
                "the last prepare"
            )
        return responses

    def sampled(self) -> dict[int, list[Rollout]]:
        """The global batches of steps to come, all that was handed over: for a checkpoint.

        Waits for them.  Where sampling fails, those before: the step that needs the others says so.
        """
        steps = {}
        for step in sorted({*self._pending, *self._there}):
            try:
                self._collect(step, self._trained + 1)
            except ValueError:
                break
            shares = parallel.gather_over_data_parallel(self._there[step])
            steps[step] = [rollout for share in shares for rollout in share]
        return steps

    def restore(self, steps: Mapping[int, Sequence[Rollout]]) -> list[int]:
        """Take up what :meth:`sampled` gave; steps whose rollouts are too old are left out."""
        old = {step: step - (_oldest(r) or step) for step, r in steps.items()}
        young = {step: r for step, r in steps.items() if old[step] <= self._steps}
        self._there = {step: parallel.local_share(r) for step, r in young.items()}
        return sorted(young)


def _oldest(sampled: Sequence[Any]) -> int | None:
    """The first policy of responses or rollouts, where one of them says."""
    return min((r.policy_version for r in sampled if r.policy_version is not None), default=None)
