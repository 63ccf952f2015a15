"""An engine's answers, looked at before anything is trained on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from megatron_phf.rollout.engines import FLAG
from megatron_phf.rollout.protocol import EngineBeside, Response, RolloutEngine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel


class CheckedEngine:
    """Another engine, whose wrong answers end the run with one error on every rank."""

    def __init__(self, engine: RolloutEngine, spec: str, vocab_size: int) -> None:
        self._engine, self._spec, self._vocab_size = engine, spec, vocab_size

    def prepare(self, step: int) -> None:
        """See ``RolloutEngine.prepare``."""
        self._engine.prepare(step)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """See ``RolloutEngine.generate``.

        Raises:
            ValueError: an answer is none; on every rank of the world.
        """
        room = _room(sampling, len(prompts), limits)
        responses = self._engine.generate(prompts, sampling, sample_ids, limits)
        problem = _problem(responses, room, self._vocab_size)
        digest = None if problem else _digest(responses)
        every = parallel.gather_objects((parallel.data_parallel_rank(), problem, digest))
        problem = next((text for _, text, _ in every if text), None)
        if problem is None and len({(rank, digest) for rank, _, digest in every}) > len(
            {rank for rank, _, _ in every}
        ):
            problem = (
                "ranks of one copy of the model got different responses; let one of them ask "
                "(megatron_phf.rollout.shared.asked_once)"
            )
        if problem is not None:
            raise ValueError(f"{FLAG} {self._spec}: {problem}")
        return responses


class CheckedEngineBeside(CheckedEngine):
    """The same of an engine that samples while the student trains."""

    _engine: EngineBeside

    def sampler(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> Callable[[], list[Response]]:
        """See ``EngineBeside.sampler``; a wrong answer is its ValueError."""
        sample = self._engine.sampler(prompts, sampling, sample_ids, limits)
        room = _room(sampling, len(prompts), limits)

        def checked() -> list[Response]:
            responses = sample()
            problem = _problem(responses, room, self._vocab_size)
            if problem is not None:
                raise ValueError(f"{FLAG} {self._spec}: {problem}")
            return responses

        return checked


def _room(sampling: SamplingParams, count: int, limits: Sequence[int] | None) -> list[int]:
    """Tokens that each response can have."""
    most = sampling.max_new_tokens
    return [most] * count if limits is None else [min(n, most) for n in limits]


def _problem(responses: Any, room: Sequence[int], vocab_size: int) -> str | None:
    """Why ``responses`` are not one ``Response`` a prompt; None where they are."""
    if not isinstance(responses, list | tuple):
        return f"generate gave a {type(responses).__name__}, need a list of Response"
    if len(responses) != len(room):
        return f"generate gave {len(responses)} responses to {len(room)} prompts; need one each"
    for number, (response, most) in enumerate(zip(responses, room, strict=True)):
        if not isinstance(response, Response):
            return f"response {number} is a {type(response).__name__}, need a Response"
        problem = _wrong_ids(response.token_ids, most, vocab_size) or _wrong_rest(response)
        if problem:
            return f"response {number}: {problem}"
    return None


def _wrong_ids(ids: Any, most: int, vocab_size: int) -> str | None:
    if not _all(ids, lambda i: isinstance(i, Integral) and not isinstance(i, bool)):
        return f"token_ids are not a list of numbers but {_shown(ids)}"
    if len(ids) > most:
        return f"{len(ids)} tokens, but limits left room for {most}; cut it there"
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        return (
            f"token ids from {min(ids)} to {max(ids)}, but the vocabulary ends at {vocab_size}; "
            "does it use the tokenizer of --hf-model?"
        )
    return None


def _wrong_rest(response: Response) -> str | None:
    """What is wrong beside the tokens."""
    count, logs, mask = len(response.token_ids), response.log_probs, response.mask
    if mask is not None and not _all(mask, lambda m: isinstance(m, bool), count):
        return f"mask is not {count} booleans, one a token, but {_shown(mask)}"
    if logs is not None and not _all(logs, _is_finite, count):
        return f"log_probs are not {count} finite numbers, one a token, but {_shown(logs)}"
    for name in ("policy_version", "policy_version_end"):
        version = getattr(response, name)
        if version is not None and not isinstance(version, int):
            return f"{name} is {_shown(version)}, need the number of a step or None"
    return None


def _all(values: Any, good: Callable[[Any], bool], count: int | None = None) -> bool:
    """Whether ``values`` is a list or tuple of ``count`` good ones."""
    if not isinstance(values, list | tuple) or count not in (None, len(values)):
        return False
    return all(good(value) for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _shown(value: Any) -> str:
    """Kind, number and start of a value."""
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"{type(value).__name__}{size}: {ascii(value)[:80]}"


def _digest(responses: Sequence[Response]) -> bytes:
    """Of what the models read and what counts."""
    content = [([*map(int, r.token_ids)], r.mask and [*r.mask]) for r in responses]
    return hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
