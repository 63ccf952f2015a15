"""What a rollout engine is: it gets the student's weights, then continues prompts.

No import of torch.  docs/engines.md says how to write one; ``tests/parallel/test_engines.py`` holds
each to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_phf.rollout.sampling import SamplingParams


@dataclass(frozen=True)
class Response:
    """What follows one prompt: token ids, the stop token included where one came.

    ``log_probs``: of each token, nats, at temperature 1 over the whole vocabulary, where the engine
    knows them: the trainer then measures how far it is from the student (``rollout_drift``).
    ``mask``: False where the student did not write the token, a tool's output for instance: both
    models read it, and it is in no loss (any number does for its log-probability).  None: it wrote
    all of them.  ``policy_version``: the step before which the weights were taken that sampled it,
    or None where that is not known (``policy_lag``); ``policy_version_end``: the last one, where
    newer weights came amid the response.
    """

    token_ids: Sequence[int]
    log_probs: Sequence[float] | None = None
    mask: Sequence[bool] | None = None
    policy_version: int | None = None
    policy_version_end: int | None = None


class WeightsLost(Exception):
    """What samples no longer has the weights that ``prepare`` brought: a server was started anew.

    A sampler raises it (see ``EngineBeside``): another ``prepare`` follows, and the step is sampled
    again.
    """


class RolloutEngine(Protocol):
    """Continues prompts of this data-parallel rank; every rank calls each method, in step."""

    def prepare(self, step: int) -> None:
        """Bring the engine what it needs of the student, before step ``step`` (1-based) asks.

        Collective over the world, so that the student may be exported here.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """One response to each prompt, in order, the same on all ranks of one copy of the model.

        ``limits``: tokens of each response at most, where fewer than ``max_new_tokens``; a tool's
        output counts.

        ``sample_ids`` name the samples in the whole run: the random numbers of a sample depend on
        the seed and its id alone, not on the batch or the layout around it.

        Raises:
            ValueError: what the user can remedy; on every rank of the world, or on one that may
                leave the others waiting (the launcher ends them).
        """
        ...


class EngineBeside(RolloutEngine, Protocol):
    """An engine that can sample while the student trains (``--max-off-policy-steps``)."""

    def sampler(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> Callable[[], list[Response]]:
        """What gives the responses of ``generate`` when it is called, in a thread.

        On one process of each copy of the model: no collectives, and nothing of the student, which
        trains meanwhile.  The weights are those of the last ``prepare`` before; should a later one
        replace them amid a response, that says so (``policy_version_end``).  Several may run at
        once, those of earlier steps first.  May raise ``WeightsLost``.
        """
        ...
