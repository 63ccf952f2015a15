"""Choosing the next token: temperature, top-k and top-p together, reproducibly.

Order as in transformers and vLLM: temperature, then top-k, then top-p within what top-k left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    @property
    def divisor(self) -> float:
        """The temperature, where logits of fp32 divided by it stay numbers."""
        return min(max(self.temperature, 1e-30), 1e30)


def uniforms(seed: int, sample_ids: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), [b, count] float64: row i is a function of (seed, sample_ids[i]).

    Counter-based, so that a sample meets the same numbers in any batch, order or layout.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, i])).random(count) for i in sample_ids]
    return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class VocabularyShard:
    """Which part of each row's logits this process has: part ``rank``, ids from ``start`` on.

    ``gather``: a tensor -> every part's, in the order of the ids.  Without it there is one part.
    """

    rank: int = 0
    start: int = 0
    gather: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]


WHOLE = VocabularyShard()
# Without top-k, so many of the most probable entries are looked at first for the nucleus.
_NUCLEUS_GUESS = 128


def _largest(logits: Tensor, k: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """The k largest of all parts, in order: values and ids [b, k] (fewer where there are fewer)."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    parts = shard.gather(values)
    if len(parts) == 1:
        return values.float(), ids
    values, ids = torch.cat(parts, -1), torch.cat(shard.gather(ids + shard.start), -1)
    values, index = values.topk(min(k, values.shape[-1]), dim=-1)
    return values.float(), ids.gather(-1, index)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities in falling order, those behind the nucleus 0."""
    if top_p == 1:  # off: sums of rounded numbers reach 1 before the end
        return probabilities
    before = probabilities.cumsum(-1) - probabilities
    # The token that crosses top_p stays, so that at least one does.
    return probabilities.masked_fill(before >= top_p, 0.0)


def filtered_probabilities(
    logits: Tensor, params: SamplingParams, shard: VocabularyShard = WHOLE
) -> tuple[Tensor, Tensor]:
    """logits [b, v] -> (probabilities [b, k] not renormalised, their ids [b, k]), falling.

    With ``top_k`` or ``top_p``.  Entries that top-p drops have probability 0 or are left out: the
    nucleus is found without sorting the vocabulary.
    """
    if params.top_k:
        values, ids = _largest(logits, params.top_k, shard)
        return _nucleus((values / params.divisor).softmax(-1), params.top_p), ids
    scaled = logits.float() / params.divisor
    total = torch.stack(shard.gather(scaled.logsumexp(-1))).logsumexp(0)[:, None]
    k = _NUCLEUS_GUESS if params.top_p < 1 else 2**62
    while True:
        values, ids = _largest(scaled, k, shard)
        probabilities = (values - total).exp()
        if values.shape[-1] < k or bool((probabilities.sum(-1) >= params.top_p).all()):
            return _nucleus(probabilities, params.top_p), ids
        k *= 8


def _invert(weights: Tensor, target: Tensor) -> Tensor:
    """weights [b, k], target [b] in [0, their sum] -> where the running sum passes the target."""
    cumulative = weights.cumsum(-1)
    index = (cumulative <= target[:, None]).sum(-1)
    # Never an entry of weight 0 at the end, whatever the rounding.
    return torch.minimum(index, (cumulative < cumulative[:, -1:]).sum(-1))


def _unfiltered(
    logits: Tensor, uniform: Tensor, temperature: float, shard: VocabularyShard
) -> Tensor:
    """A draw from all entries: each part draws, and the one in which the number falls is taken."""
    top = torch.stack(shard.gather(logits.amax(-1))).amax(0)
    weights = ((logits.float() - top[:, None].float()) / temperature).exp().double()
    masses = torch.stack(shard.gather(weights.sum(-1)), dim=-1)  # [b, parts]
    target = uniform * masses.sum(-1)
    owner = _invert(masses, target)
    before = (masses.cumsum(-1) - masses)[:, shard.rank]
    drawn = _invert(weights, (target - before).clamp(min=0)) + shard.start
    return torch.stack(shard.gather(drawn), dim=-1).gather(-1, owner[:, None]).squeeze(-1)


def sample(
    logits: Tensor, uniform: Tensor, params: SamplingParams, shard: VocabularyShard = WHOLE
) -> Tensor:
    """logits [b, v], uniform [b] in [0, 1) -> token ids [b] by inverting the distribution.

    Args:
        shard: which part of the vocabulary the logits are of (-inf: no such entry); what the parts
            exchange does not grow with it, and all get the same ids.
    """
    if params.temperature == 0:
        return _largest(logits, 1, shard)[1].squeeze(-1)
    uniform = uniform.to(logits.device)
    if params.top_k == 0 and params.top_p == 1:
        return _unfiltered(logits, uniform, params.divisor, shard)
    probabilities, ids = filtered_probabilities(logits, params, shard)
    weights = probabilities.double()
    index = _invert(weights, uniform * weights.sum(-1))
    return ids.gather(-1, index[:, None]).squeeze(-1)
