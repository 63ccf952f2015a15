"""An engine whose rollouts are as old as --max-off-policy-steps allows, for one process.

    bash examples/pretrain_phf.sh ... --rollout-engine benchmarks.stale:make_engine \\
        --max-off-policy-steps 2

It samples in process at the moment when prompts are handed over, so that nothing goes on beside
training and no clock decides which weights sampled: what staleness costs, without what it gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_phf.rollout.context import RolloutContext
from megatron_phf.rollout.megatron.engine import MegatronRollouts
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams


class StaleRollouts(MegatronRollouts):
    """The in-process engine, which has sampled before its sampler is called."""

    def sampler(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        sample_ids: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> Callable[[], list[Response]]:
        """See ``EngineBeside.sampler``."""
        responses = self.generate(prompts, sampling, sample_ids, limits)
        return lambda: responses


def make_engine(context: RolloutContext) -> StaleRollouts:
    """The factory that --rollout-engine names."""
    size = context.config.rollout.rollout_batch_size
    return StaleRollouts(context.student, context.vocab_size, size)
