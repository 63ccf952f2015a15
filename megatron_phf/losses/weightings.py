"""What each token counts in the losses: a table of weightings of on-policy distillation's papers.

No import of torch, as the command line takes its choices from here.

b responses of at most r tokens, of which those ``scored`` are trained on.  A weight multiplies its
token's divergence, whose sum is divided by the number of scored tokens as without weights.
Selections keep a share of a response and let it stand for the whole: weights of mean 1, so that the
loss keeps its scale.  The others are as their papers have them, without a normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# PW-OPSD's schedule "moderate": the least weight, where it rises, over what share of a response.
_LEAST, _RISE, _WIDTH = 0.25, 0.30, 0.10


@dataclass(frozen=True)
class WeightingOptions:
    """``keep_fraction``: of a response's tokens, by selections; ``entropy_threshold``: nats."""

    keep_fraction: float = 0.5
    entropy_threshold: float = 0.8

    def __post_init__(self) -> None:
        assert 0 < self.keep_fraction <= 1, f"keep_fraction {self.keep_fraction}: above 0 to 1"
        assert self.entropy_threshold >= 0, f"entropy_threshold {self.entropy_threshold}: below 0"


# statistic [b, r], scored bool [b, r], options -> weights [b, r], 0 where not scored.
Rule = Callable[["Tensor", "Tensor", WeightingOptions], "Tensor"]


@dataclass(frozen=True)
class TokenWeighting:
    """One weighting: the statistic of each token that it needs, None for none, and its rule."""

    statistic: str | None
    rule: Rule
    source: str


def _keep_largest(statistic: Tensor, scored: Tensor, options: WeightingOptions) -> Tensor:
    """The largest ``keep_fraction`` of each response, rounded up; of equal ones the first."""
    count = scored.sum(1, keepdim=True)
    kept = (count * options.keep_fraction - 1e-6).ceil()  # a tenth of 30 is 3
    ordered = statistic.masked_fill(~scored, -math.inf)
    rank = ordered.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return (count / kept.clamp(min=1)).where(scored & (rank < kept), 0.0)


def _twice_above(statistic: Tensor, scored: Tensor, options: WeightingOptions) -> Tensor:
    """1, and 1 more above the threshold."""
    return (1.0 + (statistic > options.entropy_threshold)).where(scored, 0.0)


def _later(statistic: Tensor, scored: Tensor, options: WeightingOptions) -> Tensor:
    """w_min + (1 - w_min) sigmoid((u - tau) / s), u = (t - 1/2) / T of the scored tokens t."""
    place = (scored.cumsum(1) - 0.5) / scored.sum(1, keepdim=True).clamp(min=1)
    rising = ((place - _RISE) / _WIDTH).sigmoid()
    return (_LEAST + (1 - _LEAST) * rising).where(scored, 0.0)


TOKEN_WEIGHTINGS = {
    "teacher_entropy": TokenWeighting(
        "teacher_entropy", _twice_above, "EOPD, arXiv:2603.07079: its gate, as a weight"
    ),
    "student_entropy": TokenWeighting(
        "student_entropy", _keep_largest, "TIP, arXiv:2604.14084: entropy alone"
    ),
    "position": TokenWeighting(None, _later, "PW-OPSD, arXiv:2605.21606"),
    "divergence_top_p": TokenWeighting(
        "divergence", _keep_largest, "TIP, arXiv:2604.14084: its second axis alone"
    ),
}


def token_weights(
    name: str,
    scored: Tensor,
    statistic: Tensor | None = None,
    options: WeightingOptions | None = None,
) -> Tensor:
    """Weights fp32 [b, r] of weighting ``name``, 0 where not ``scored`` bool [b, r].

    Args:
        statistic: [b, r], what the weighting needs (``TOKEN_WEIGHTINGS[name].statistic``): an
            entropy or a divergence, nats, at the loss's temperature.
    """
    weighting = TOKEN_WEIGHTINGS[name]
    if statistic is None:
        assert weighting.statistic is None, f"{name!r} needs each token's {weighting.statistic}"
        statistic = scored.float() * 0
    return weighting.rule(statistic.float(), scored, options or WeightingOptions())
