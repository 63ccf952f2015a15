"""Where rollouts come from: sampled in Megatron or by vLLM servers, or replayed from a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_phf.rollout.sampling import SamplingParams


class RolloutEngine(Protocol):
    """Continues prompts of this data-parallel rank; every model-parallel rank calls it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Token ids generated after each prompt, the stop token included where one came.

        ``limits``: tokens of each response at most, where fewer than ``max_new_tokens``.

        ``sample_ids`` name the samples in the whole run: the random numbers of a sample depend on
        the seed and its id alone, not on the batch or the layout around it.
        """
        ...
