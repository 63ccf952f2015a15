"""Truncated importance weights: what older weights sampled counts as if the student had."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.runtime import device, parallel


class ImportanceWeights:
    """min(cap, pi(y) / b(y)) of each sampled token y: pi the student, b what sampled it.

    Both at temperature 1 over the whole vocabulary, without gradient: truncated importance
    sampling (Ionides 2008), a token at a time.  What stands before a token stays as it was sampled,
    which no token's own ratio corrects (arXiv:2605.07331).  ``cap`` None: off.
    """

    def __init__(self, cap: float | None) -> None:
        self._cap = cap
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device.device())

    def check(self, measured: int, rollouts: int) -> None:
        """Raise ValueError where not all ``rollouts`` of a global batch say how they were sampled.

        ``measured``: those that do.
        """
        if self._cap is not None and measured < rollouts:
            raise ValueError(
                f"--importance-ratio-cap: {rollouts - measured} of {rollouts} rollouts have no "
                "log-probabilities of what sampled them; let the engine (or the replay file's "
                "log_probs) give them, or leave the flag out"
            )

    def of(self, student: Tensor, sampler: Tensor) -> Tensor | None:
        """Log-probabilities [n] of the same tokens -> their weights, fp32 [n]; None where off."""
        if self._cap is None:
            return None
        ratio = (student.double() - sampler).exp()
        weights = ratio.clamp(max=self._cap)
        count = torch.ones_like(ratio).sum()
        self._sums += torch.stack((weights.sum(), (ratio > self._cap).double().sum(), count))
        return weights.float()

    def take(self) -> dict[str, float]:
        """The metrics of the tokens since the last call; collective."""
        if self._cap is None:
            return {}
        if parallel.tensor_parallel_rank() > 0:  # they have the same tokens as rank 0
            self._sums.zero_()
        dist.all_reduce(self._sums)
        weight, clipped, count = self._sums.tolist()
        self._clear()
        most = max(count, 1)
        return {"importance_weight": weight / most, "importance_clipped_fraction": clipped / most}
