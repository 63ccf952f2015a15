"""Rollouts from vLLM servers, whose weights follow the student's.

One process of each data-parallel rank asks, and hands the answers to the others of its model.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

from megatron_phf.config.settings import Config
from megatron_phf.rollout.context import RolloutContext
from megatron_phf.rollout.protocol import Response, WeightsLost
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.shared import asked_once
from megatron_phf.rollout.vllm.colocated import Beds
from megatron_phf.rollout.vllm.flags import syncs_by_disk
from megatron_phf.rollout.vllm.gate import Gate
from megatron_phf.rollout.vllm.launch import launched
from megatron_phf.rollout.vllm.server import Question, VllmServer
from megatron_phf.rollout.vllm.sync import WeightSync, connect, deadline
from megatron_phf.rollout.vllm.transfer import WeightTransfer
from megatron_phf.rollout.workers import Workers
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_every_rank


def make_engine(context: RolloutContext) -> VllmRollouts:
    """The servers of ``--vllm-url`` or ``--vllm-launch``, asked before any weights are read."""
    config, watchers = launched(context.config)
    servers = connect(config, context.arch)
    beds = Beds(servers, config)
    beds.sleep()  # the student is read into the memory
    make = WeightSync if syncs_by_disk(config) else WeightTransfer
    sync = make(servers, context.student, context.arch, config)
    engine = VllmRollouts(servers, sync, beds, context.vocab_size, config)
    engine.watchers = watchers
    return engine


class VllmRollouts:
    """Samples from vLLM servers (see ``RolloutEngine``); requests are spread over all of them."""

    watchers: object = None  # a server of the run's own lives as long as they do

    def __init__(
        self,
        servers: list[VllmServer],
        sync: WeightSync | WeightTransfer,
        beds: Beds,
        vocab_size: int,
        config: Config,
    ) -> None:
        self._servers, self._sync, self._vocab_size = servers, sync, vocab_size
        self._beds, self._config = beds, config
        self._step = 0
        self._synced: int | None = None  # the step whose weights the servers have
        self._workers, self._gate = Workers(config.vllm.vllm_concurrency, "vllm"), Gate()

    def prepare(self, step: int) -> None:
        """The student's weights to all servers, where it is their turn.

        Requests under way end on the adapter that began them, and go on with weights that came
        without a disk.  Where a server reads its only weights anew they are waited for, and those
        that have not begun wait: vLLM then drops no prefix cache of requests that run.

        Raises:
            ValueError: a server does not take them; on every rank.
        """
        self._step = step
        due = (step - 1) % self._config.vllm.vllm_sync_interval == 0
        self._wake(bring=self._synced is None or due)

    def _wake(self, bring: bool) -> None:
        self._beds.wake_weights()
        if bring:
            self._bring()
        self._beds.wake_cache()

    def _bring(self) -> None:
        if self._sync.drains and self._config.rollout.max_off_policy_steps > 1:
            on_every_rank(self._gate.close, deadline(self._config))
        self._sync.push(self._step)
        self._synced = self._step
        self._gate.open()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """See ``RolloutEngine.generate``.

        Raises:
            ValueError: a request has failed for good; on every rank of the world.
        """
        if self._beds.asleep:  # asked again in one step
            self._wake(bring=self._beds.forget)
        ask = self.sampler(prompts, sampling, sample_ids, limits)
        for _ in range(1 + self._config.vllm.vllm_max_retries):
            try:
                responses = asked_once(ask)
            except WeightsLost:
                self._bring()
            else:
                self._beds.sleep()
                return responses
        raise ValueError(
            "--vllm-url: a server is restarted in every phase of rollouts (see its log)"
        )

    def sampler(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> Callable[[], list[Response]]:
        """See ``EngineBeside.sampler``; with adapters, all of it is by the one there is now."""
        most = sampling.max_new_tokens
        room = itertools.repeat(most) if limits is None else (min(n, most) for n in limits)
        questions = [
            Question(list(prompt), sampling, parallel.derived_seed("vllm", sampling.seed, i), n)
            for prompt, i, n in zip(prompts, sample_ids, room, strict=False)
        ]
        adapter, version = self._sync.adapter, self._synced
        return lambda: self._ask(questions, adapter, version)

    def _ask(self, questions: list[Question], adapter: str, version: int | None) -> list[Response]:
        """All at once, as far as allowed; the first failure ends the rest.

        ``adapter``: that of ``version``; empty: the servers have one policy, the newest.
        """
        phases = 1 + self._config.rollout.max_off_policy_steps  # others' requests come before
        until, stopped = deadline(self._config, phases), threading.Event()
        turns: Iterator[VllmServer] = itertools.cycle(self._servers)
        for _ in range(parallel.data_parallel_rank()):
            next(turns)

        def one(question: Question, server: VllmServer) -> Response:
            if stopped.is_set():
                raise ValueError("another request has failed")
            with self._gate.passed():
                return server.complete(
                    question,
                    adapter or self._sync.model(server, until),
                    self._vocab_size,
                    until,
                    stopped,
                    lambda: self._sync.restore(server, adapter, until),
                    lambda: version if adapter else self._policy(server),
                )

        futures = [
            self._workers.submit(functools.partial(one, q, s))
            for q, s in zip(questions, turns, strict=False)
        ]
        try:
            return [future.result() for future in futures]
        finally:
            stopped.set()
            for future in futures:  # not waiting for requests that nobody needs any longer
                future.cancel()

    def _policy(self, server: VllmServer) -> int | None:
        told = self._sync.told(server)
        return self._synced if told is None else told
