"""How far the engine that sampled the rollouts is from the student that trains on them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.runtime import device, parallel
from megatron_phf.train.logging import say


class DriftMeter:
    """Mean and largest |log p_engine(y) - log p_student(y)| over a step's sampled tokens, nats.

    Both at temperature 1 over the whole vocabulary.  Not zero between two implementations in
    bf16; large where the engine computes with other weights.  A microbatch counts where all of its
    rollouts have log-probabilities.
    """

    def __init__(self, config: Config) -> None:
        # Of older weights' rollouts it is the student's own way since then.
        stale = config.rollout.max_off_policy_steps > 0
        self._threshold = math.inf if stale else config.rollout.engine_drift_warning
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device.device())
        self._largest = torch.zeros(1, dtype=torch.float64, device=device.device())

    def add(self, student: Tensor, server: Tensor) -> None:
        """Log-probabilities [n] of the same tokens."""
        difference = (student.double() - server).abs()
        self._sums += torch.stack((difference.sum(), torch.ones_like(difference).sum()))
        if len(difference):
            self._largest = torch.maximum(self._largest, difference.max())

    def take(self) -> dict[str, Any]:
        """The metrics ``rollout_drift``, ``..._max``, ``..._warning`` since the last call.

        Collective; warns where the mean is beyond the threshold.
        """
        if parallel.tensor_parallel_rank() > 0:  # they have the same tokens as rank 0
            self._sums.zero_()
        dist.all_reduce(self._sums)
        dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        total, count, largest = torch.cat((self._sums, self._largest)).tolist()
        mean = total / max(count, 1)
        self._clear()
        beyond = not mean <= self._threshold
        if beyond:
            say(
                "warning: log-probabilities of the rollout engine and of the student differ by "
                f"{mean:.3g} nats on average, more than --engine-drift-warning "
                f"{self._threshold:g}: has the engine the student's weights, its dtype and, in "
                "vLLM, --logprobs-mode raw_logprobs?"
            )
        names = ("rollout_drift", "rollout_drift_max", "rollout_drift_warning")
        return dict(zip(names, (mean, largest, beyond), strict=True))
