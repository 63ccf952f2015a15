"""Where a step's rollouts come from, on this data-parallel rank: the student, or files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_names
from megatron_phf.data.rollouts import Rollout, read_rollouts
from megatron_phf.rollout.ahead import AheadSource
from megatron_phf.rollout.checked import CheckedEngine, CheckedEngineBeside
from megatron_phf.rollout.context import RolloutContext
from megatron_phf.rollout.engines import engine_row, make_by_factory
from megatron_phf.rollout.order import (
    ProblemOrder,
    ResponseRoom,
    as_rollout,
    asked,
    problem_order,
    response_room,
)
from megatron_phf.rollout.protocol import Response, RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel


class RolloutSource(Protocol):
    """Gives each step this data-parallel rank's share of the global batch."""

    def rollouts(self, iteration: int) -> list[Rollout]:
        """The share of step ``iteration`` (1-based), the same whatever came before."""
        ...


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
        self._engine.prepare(iteration)
        responses = self._engine.generate(*asked(pairs, self._room, self._sampling, sample_ids))
        return [as_rollout(*each) for each in zip(pairs, responses, strict=True)]


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
            as_rollout(pair, Response(solution[: self._room.of(pair)]))
            for pair, solution in zip(pairs, solutions, strict=True)
        ]


class ReplaySource:
    """Recorded rollouts, in file order: step i trains on the i-th global batch of the file."""

    def __init__(self, path: str, vocab_size: int, config: Config) -> None:
        self._rollouts = read_rollouts(path, vocab_size, teacher_names(config))
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
    return problem_order(context.config, context.prompts.pairs)


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
    rollout = context.config.rollout
    spec, beside = rollout.rollout_engine, rollout.max_off_policy_steps > 0
    engine = make_by_factory(spec, context, beside)
    checked = CheckedEngineBeside if beside else CheckedEngine
    return checked(engine, spec, context.vocab_size)


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
    engine, room = make_engine(context), response_room(config, context.models)
    if isinstance(engine, CheckedEngineBeside):
        return AheadSource(engine, _order(context), sampling, room, config)
    return OnPolicySource(engine, _order(context), sampling, room)
