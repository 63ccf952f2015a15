"""Choosing the next token: temperature, top-k and top-p together, reproducibly.

Order as in transformers and vLLM: temperature, then top-k, then top-p within what top-k left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"--rollout-temperature {self.temperature}, --rollout-top-p {self.top_p}, "
                f"--rollout-top-k {self.top_k}: need >= 0, in (0, 1], >= 0"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: need at least 1")


def uniforms(seed: int, sample_ids: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), [b, count] float64: row i is a function of (seed, sample_ids[i]).

    Counter-based, so that a sample meets the same numbers in any batch, order or layout.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, i])).random(count) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """logits [b, v] -> (probabilities [b, k] not renormalised, their ids [b, k] or None for all).

    Entries that top-p drops have probability 0.
    """
    scaled = logits.float() / params.temperature
    if params.top_k == 0 and params.top_p == 1:
        return scaled.softmax(-1), None
    k = min(params.top_k, scaled.shape[-1]) if params.top_k else scaled.shape[-1]
    values, ids = scaled.topk(k, dim=-1)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The token that crosses top_p stays, so that at least one does.
    return probabilities.masked_fill(before >= params.top_p, 0.0), ids


def sample(logits: Tensor, uniform: Tensor, params: SamplingParams) -> Tensor:
    """logits [b, v], uniform [b] in [0, 1) -> token ids [b] by inverting the distribution."""
    if params.temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = filtered_probabilities(logits, params)
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = (cumulative <= target).sum(-1, keepdim=True)
    index = index.clamp(max=probabilities.shape[-1] - 1)
    return (index if ids is None else ids.gather(-1, index)).squeeze(-1)
