"""Where a step's rollouts come from, on this data-parallel rank: the student, or a replay file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_phf import parallel
from megatron_phf.config import Config
from megatron_phf.data.problems import keep_lines
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.replay_file import Rollout, read_rollouts, rollout_to_json
from megatron_phf.rollout import RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm import VllmRollouts


class RolloutSource(Protocol):
    """Gives each step this data-parallel rank's share of the global batch."""

    def rollouts(self, iteration: int) -> list[Rollout]:
        """The share of step ``iteration`` (1-based), the same whatever came before."""
        ...


class OnPolicySource:
    """The student samples: problems in a seeded order, each epoch another permutation."""

    def __init__(
        self,
        engine: RolloutEngine,
        pairs: Sequence[PromptPair],
        sampling: SamplingParams,
        global_batch_size: int,
        max_positions: int,
        teacher_positions: int | None = None,
    ) -> None:
        """``teacher_positions``: where the teacher's positions end, if not with the student's."""
        self._engine, self._pairs, self._sampling = engine, pairs, sampling
        self._batch, self._max_positions = global_batch_size, max_positions
        self._teacher_positions = max_positions if teacher_positions is None else teacher_positions

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        first = (iteration - 1) * self._batch
        sample_ids = parallel.local_share(range(first, first + self._batch))
        pairs = [self._pairs[self._problem_of(i)] for i in sample_ids]
        prompts = [pair.student_ids for pair in pairs]
        # Both models must be able to read the whole response behind their prompt.
        room = [
            min(
                self._max_positions - len(pair.student_ids),
                self._teacher_positions - len(pair.teacher_ids),
            )
            for pair in pairs
        ]
        sampled = self._sample(prompts, sample_ids, room)
        return [
            Rollout(pair.student_ids, pair.teacher_ids, *each)
            for pair, each in zip(pairs, sampled, strict=True)
        ]

    def _sample(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], room: Sequence[int]
    ) -> Iterable[tuple[tuple[int, ...], tuple[float, ...] | None]]:
        """(token ids, their log-probabilities where another program sampled them) a prompt."""
        responses = self._engine.generate(prompts, self._sampling, sample_ids, room)
        return ((tuple(response), None) for response in responses)

    def _problem_of(self, sample_id: int) -> int:
        epoch, position = divmod(sample_id, len(self._pairs))
        generator = np.random.Generator(np.random.Philox(key=[self._sampling.seed, 2**32 + epoch]))
        return int(generator.permutation(len(self._pairs))[position])


class ServedSource(OnPolicySource):
    """On-policy rollouts from vLLM servers, which get the student's weights first."""

    def __init__(self, engine: VllmRollouts, *args: Any) -> None:
        """``args``: those of ``OnPolicySource`` after the engine."""
        super().__init__(engine, *args)
        self._servers = engine

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        self._servers.sync(iteration)
        return super().rollouts(iteration)

    def _sample(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], room: Sequence[int]
    ) -> Iterable[tuple[tuple[int, ...], tuple[float, ...] | None]]:
        responses = self._servers.respond(prompts, self._sampling, sample_ids, room)
        return ((tuple(r.token_ids), tuple(r.log_probs)) for r in responses)


class ReplaySource:
    """Recorded rollouts, in file order: step i trains on the i-th global batch of the file."""

    def __init__(self, path: str, vocab_size: int, config: Config) -> None:
        self._rollouts = read_rollouts(path, vocab_size)
        self._batch = config.train.global_batch_size
        steps = len(self._rollouts) // self._batch
        if config.train.train_iters > steps:
            raise ValueError(
                f"--replay-file {path}: {len(self._rollouts)} rollouts make {steps} step(s) of "
                f"--global-batch-size {self._batch}, fewer than --train-iters "
                f"{config.train.train_iters}; lower one of them"
            )

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        first = (iteration - 1) * self._batch
        return parallel.local_share(self._rollouts[first : first + self._batch])


class RecordingSource:
    """Another source, every rollout of which is also appended to a replay file.

    A resumed run keeps the first ``kept`` lines that the file has.
    """

    def __init__(self, source: RolloutSource, path: str, kept: int = 0) -> None:
        self._source, self._path = source, path
        if parallel.is_first_rank():
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            keep_lines(path, lambda number, line: number <= kept)

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        local = self._source.rollouts(iteration)
        shares = parallel.gather_over_data_parallel([rollout_to_json(r) for r in local])
        if parallel.is_first_rank():
            with open(self._path, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(r) + "\n" for share in shares for r in share)
        return local
