"""The table of output losses: a new one is a row with its value and its slope.

No import of torch, as the command line takes its choices from here.  log_s and log_t are log p_S
and log p_T of all vocabulary entries, or of this rank's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MODES = ("entry", "token", "none")


@dataclass(frozen=True)
class Divergence:
    """A loss of whole distributions, as a sum over vocabulary entries.

    ``terms(log_s, log_t, beta)``: each entry's term.  ``slope(log_s, log_t, beta, terms)``: its
    derivative in log p_S of that entry.
    """

    terms: Callable[[Tensor, Tensor, float], Tensor]
    slope: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    reads_teacher = True
    needs_targets = False


@dataclass(frozen=True)
class SampledToken:
    """-A log p_S(y) of the sampled token y: ``advantage(log p_S(y), log p_T(y))`` is constant."""

    advantage: Callable[[Tensor, Tensor], Tensor]
    reads_teacher: bool = True
    needs_targets = True


def _log_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    return (log_s + math.log1p(-beta)).logaddexp(log_t + math.log(beta))


def jsd_terms(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence: see ``DivergenceSpec``."""
    if beta == 0:
        return log_t.exp() * (log_t - log_s)
    if beta == 1:
        return log_s.exp() * (log_s - log_t)
    log_m = _log_mixture(log_s, log_t, beta)
    p_t, p_s = log_t.exp(), log_s.exp()
    return beta * p_t * (log_t - log_m) + (1 - beta) * p_s * (log_s - log_m)


def _jsd_slope(log_s: Tensor, log_t: Tensor, beta: float, terms: Tensor) -> Tensor:
    if beta == 0:
        return -log_t.exp()
    p_s = log_s.exp()
    if beta == 1:
        return terms + p_s
    return (1 - beta) * p_s * (log_s - _log_mixture(log_s, log_t, beta))


OBJECTIVES: dict[str, Divergence | SampledToken] = {
    "jsd": Divergence(jsd_terms, _jsd_slope),
    "policy_gradient": SampledToken(lambda log_s, log_t: log_t - log_s),
    "cross_entropy": SampledToken(lambda log_s, log_t: log_s.new_ones(()), reads_teacher=False),
}
