"""Where a step's rollouts come from, on this data-parallel rank: the student, or files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_phf import parallel
from megatron_phf.config import Config
from megatron_phf.data.problems import keep_lines
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.replay_file import Rollout, is_rollout, read_rollouts, rollout_to_json
from megatron_phf.rollout import RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm import VllmRollouts


class RolloutSource(Protocol):
    """Gives each step this data-parallel rank's share of the global batch."""

    def rollouts(self, iteration: int) -> list[Rollout]:
        """The share of step ``iteration`` (1-based), the same whatever came before."""
        ...


class ProblemOrder:
    """Which problems a step takes: seeded, each epoch another permutation."""

    def __init__(self, pairs: Sequence[PromptPair], global_batch_size: int, seed: int) -> None:
        self._pairs, self._batch, self._seed = pairs, global_batch_size, seed

    def share(self, iteration: int) -> tuple[list[int], list[PromptPair]]:
        """Sample ids (over the whole run) and prompts of this data-parallel rank's share."""
        first = (iteration - 1) * self._batch
        sample_ids = parallel.local_share(range(first, first + self._batch))
        return list(sample_ids), [self._pairs[self._problem_of(i)] for i in sample_ids]

    def _problem_of(self, sample_id: int) -> int:
        epoch, position = divmod(sample_id, len(self._pairs))
        generator = np.random.Generator(np.random.Philox(key=[self._seed, 2**32 + epoch]))
        return int(generator.permutation(len(self._pairs))[position])


@dataclass(frozen=True)
class ResponseRoom:
    """Both models must be able to read a whole response behind their prompts.

    ``student``, ``teacher``: where their positions end; ``max_new_tokens``: of any response.
    """

    student: int
    teacher: int
    max_new_tokens: int

    def of(self, pair: PromptPair) -> int:
        """Tokens that a response to these prompts can have."""
        behind = (self.student - len(pair.student_ids), self.teacher - len(pair.teacher_ids))
        return min(*behind, self.max_new_tokens)


def _rollout(
    pair: PromptPair, response: Sequence[int], log_probs: tuple[float, ...] | None = None
) -> Rollout:
    return Rollout(pair.student_ids, pair.teacher_ids, tuple(response), log_probs)


class OnPolicySource:
    """The student samples."""

    def __init__(
        self,
        engine: RolloutEngine,
        order: ProblemOrder,
        sampling: SamplingParams,
        room: ResponseRoom,
    ) -> None:
        self._engine, self._order, self._sampling, self._room = engine, order, sampling, room

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        sample_ids, pairs = self._order.share(iteration)
        prompts = [pair.student_ids for pair in pairs]
        room = [self._room.of(pair) for pair in pairs]
        sampled = self._sample(prompts, sample_ids, room)
        return [_rollout(pair, *each) for pair, each in zip(pairs, sampled, strict=True)]

    def _sample(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], room: Sequence[int]
    ) -> Iterable[tuple[tuple[int, ...], tuple[float, ...] | None]]:
        """(token ids, their log-probabilities where another program sampled them) a prompt."""
        responses = self._engine.generate(prompts, self._sampling, sample_ids, room)
        return ((tuple(response), None) for response in responses)


class ReferenceSource:
    """The reference solutions in the place of rollouts: what supervised fine-tuning reads."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        stop_id: int,
        order: ProblemOrder,
        room: ResponseRoom,
    ) -> None:
        """``encode``: text to token ids; ``stop_id`` ends each solution that has room for it."""
        self._encode, self._stop_id, self._order, self._room = encode, stop_id, order, room

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        _, pairs = self._order.share(iteration)
        solutions = [[*self._encode(p.problem.solution), self._stop_id] for p in pairs]
        return [
            _rollout(pair, solution[: self._room.of(pair)])
            for pair, solution in zip(pairs, solutions, strict=True)
        ]


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


def _check_row_length(path: str, rollouts: Sequence[Rollout], config: Config) -> None:
    """All rows have one length with --tp-comm-overlap."""
    budget = config.batching.max_tokens_per_microbatch
    for number, r in enumerate(rollouts if config.parallel.tp_comm_overlap else [], 1):
        prompt = max(len(r.student_prompt_ids), len(r.teacher_prompt_ids))
        if prompt + len(r.response_ids) > budget:
            raise ValueError(
                f"--replay-file {path}: line {number} has {prompt + len(r.response_ids)} tokens, "
                f"which a row of --max-tokens-per-microbatch {budget} must hold for "
                "--tp-comm-overlap; raise it"
            )


class ReplaySource:
    """Recorded rollouts, in file order: step i trains on the i-th global batch of the file."""

    def __init__(self, path: str, vocab_size: int, config: Config) -> None:
        self._rollouts = read_rollouts(path, vocab_size)
        _check_row_length(path, self._rollouts, config)
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
            os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
            keep_lines(path, lambda number, line: number <= kept, is_rollout)

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        local = self._source.rollouts(iteration)
        shares = parallel.gather_over_data_parallel([rollout_to_json(r) for r in local])
        if parallel.is_first_rank():
            with open(self._path, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(r) + "\n" for share in shares for r in share)
        return local
