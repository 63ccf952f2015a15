"""Rollout engines of a user's own, with a fault each; by ``package.module:factory``."""

from __future__ import annotations

from megatron_phf.rollout.protocol import Response
from megatron_phf.runtime import parallel

NOT_A_FUNCTION = 3


class Scripted:
    """Gives ``answer`` of the prompts' number, whatever is asked."""

    def __init__(self, answer) -> None:
        self._answer = answer

    def prepare(self, step: int) -> None:
        pass

    def generate(self, prompts, sampling, sample_ids, limits=None):
        return self._answer(len(prompts))


def short_on_one_rank(context) -> Scripted:
    missing = parallel.tensor_parallel_rank()
    return Scripted(lambda count: [Response([4])] * (count - missing))


def no_engine(context) -> str:
    return "an engine"


def without_context() -> Scripted:
    return Scripted(lambda count: [])


def in_process(context) -> Scripted:
    return Scripted(lambda count: [Response([4])] * count)
