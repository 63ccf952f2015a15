"""Where a step's rollouts come from, on this data-parallel rank: the student, or files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import append_jsonl, keep_lines
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.rollouts import Rollout, is_rollout, read_rollouts, rollout_to_json
from megatron_phf.rollout.checked import CheckedEngine
from megatron_phf.rollout.context import RolloutContext
from megatron_phf.rollout.engines import engine_row, make_by_factory
from megatron_phf.rollout.protocol import Response, RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.teacher.architecture import Models


class RolloutSource(Protocol):
    """Gives each step this data-parallel rank's share of the global batch."""

    def rollouts(self, iteration: int) -> list[Rollout]:
        """The share of step ``iteration`` (1-based), the same whatever came before."""
        ...


def problem_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch (from 0) takes ``count`` problems."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 2**32 + epoch]))
    return generator.permutation(count)


class ProblemOrder:
    """Which problems a step takes: seeded, each epoch another permutation."""

    def __init__(self, pairs: Sequence[PromptPair], global_batch_size: int, seed: int) -> None:
        self._pairs, self._batch, self._seed = pairs, global_batch_size, seed
        self._known: dict[int, np.ndarray] = {}

    def share(self, iteration: int) -> tuple[list[int], list[PromptPair]]:
        """Sample ids (over the whole run) and prompts of this data-parallel rank's share."""
        first = (iteration - 1) * self._batch
        sample_ids = parallel.local_share(range(first, first + self._batch))
        return list(sample_ids), [
            self._pairs[self._problem_of(i)].at(iteration) for i in sample_ids
        ]

    def _problem_of(self, sample_id: int) -> int:
        epoch, position = divmod(sample_id, len(self._pairs))
        if epoch not in self._known:  # of the last one alone: it is as long as the data
            self._known = {epoch: problem_permutation(len(self._pairs), self._seed, epoch)}
        return int(self._known[epoch][position])


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


def response_room(config: Config, models: Models) -> ResponseRoom:
    """Where student and teacher, which may be another model, end a response."""
    student, teacher = (m.max_position_embeddings for m in (models.student, models.teacher))
    return ResponseRoom(student, teacher, config.rollout.max_new_tokens)


def sampling_params(config: Config, stop_ids: tuple[int, ...]) -> SamplingParams:
    """The rollouts' sampling."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        max_new_tokens=rollout.max_new_tokens,
        stop_ids=stop_ids,
        seed=config.train.seed,
    )


def _rollout(pair: PromptPair, response: Response) -> Rollout:
    logs, mask = response.log_probs, response.mask
    return Rollout(
        pair.student_ids,
        pair.teacher_ids,
        tuple(response.token_ids),
        None if logs is None else tuple(logs),
        None if mask is None else tuple(mask),
        response.policy_version,
        pair.problem.solution or None,
    )


class OnPolicySource:
    """The student samples, by an engine."""

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
        self._engine.prepare(iteration)
        responses = self._engine.generate(prompts, self._sampling, sample_ids, room)
        return [_rollout(*each) for each in zip(pairs, responses, strict=True)]


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
            _rollout(pair, Response(solution[: self._room.of(pair)]))
            for pair, solution in zip(pairs, solutions, strict=True)
        ]


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


def _order(context: RolloutContext) -> ProblemOrder:
    train = context.config.train
    return ProblemOrder(context.prompts.pairs, train.global_batch_size, train.seed)


def reference_source(context: RolloutContext) -> ReferenceSource:
    """``--rollout-engine reference``."""
    prompts, room = context.prompts, response_room(context.config, context.models)
    end = prompts.tokenizer.eos_id
    stop = prompts.stop_ids[0] if end is None else end
    return ReferenceSource(prompts.tokenizer.encode, stop, _order(context), room)


def replay_source(context: RolloutContext) -> ReplaySource:
    """``--rollout-engine replay``."""
    path = context.config.rollout.replay_file
    assert path is not None, "checked before launch"
    return ReplaySource(path, context.vocab_size, context.config)


def make_engine(context: RolloutContext) -> RolloutEngine:
    """The engine of ``--rollout-engine``, its answers checked; every rank calls it.

    Raises:
        ValueError: it cannot be made; says why.
    """
    spec = context.config.rollout.rollout_engine
    return CheckedEngine(make_by_factory(spec, context), spec, context.vocab_size)


def make_source(context: RolloutContext) -> RolloutSource:
    """Where ``--rollout-engine`` takes a step's rollouts from; every rank calls it.

    Raises:
        ValueError: as :func:`make_engine`.
    """
    config, spec = context.config, context.config.rollout.rollout_engine
    if not engine_row(spec).samples:
        source: RolloutSource = make_by_factory(spec, context)
        return source
    sampling = sampling_params(config, context.prompts.stop_ids)
    room = response_room(config, context.models)
    return OnPolicySource(make_engine(context), _order(context), sampling, room)


def recorded(source: RolloutSource, config: Config, done: int) -> RolloutSource:
    """With ``--record-rollouts`` in that file too, behind the rollouts of ``done`` steps."""
    path = config.rollout.record_rollouts
    if path is None:
        return source
    return RecordingSource(source, path, done * config.train.global_batch_size)


class RecordingSource:
    """Another source, every rollout of which is also appended to a replay file.

    A resumed run keeps the first ``kept`` lines that the file has.
    """

    def __init__(self, source: RolloutSource, path: str, kept: int = 0) -> None:
        self._source, self._path = source, path
        on_first_rank(self._begin, kept)

    def _begin(self, kept: int) -> None:
        os.makedirs(os.path.dirname(os.path.realpath(self._path)), exist_ok=True)
        keep_lines(self._path, lambda number, line: number <= kept, is_rollout)

    def rollouts(self, iteration: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        local = self._source.rollouts(iteration)
        shares = parallel.gather_over_data_parallel([rollout_to_json(r) for r in local])
        on_first_rank(append_jsonl, self._path, [r for share in shares for r in share])
        return local
