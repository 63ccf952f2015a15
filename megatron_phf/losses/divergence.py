"""The output losses of OPSD (arXiv:2601.18734) on whole logits, for any trainer.

n tokens, v vocabulary entries.  The teacher is detached; gradients come from autograd.
``chunked_divergence`` gives the same values without holding [n, v] logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_phf.losses.objectives import CLIP_MODES, jsd_terms


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence: generalised Jensen-Shannon with weight ``beta``.

    beta = 0 is KL(p_T || p_S), beta = 1 is KL(p_S || p_T).  ``clip_mode``: ``entry`` clamps each
    vocabulary entry's contribution from above at ``clip`` before the sum (negative ones stay),
    ``token`` clamps a token's sum.  ``top_k`` > 0 keeps the teacher's k most probable entries and
    renormalises both distributions over them.
    """

    beta: float = 0.0
    temperature: float = 1.1
    clip_mode: str = "entry"
    clip: float = 0.05
    top_k: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.beta <= 1, f"beta {self.beta}: need 0 to 1"
        assert self.temperature > 0, f"temperature {self.temperature}: need above 0"
        assert self.clip_mode in CLIP_MODES, f"clip_mode {self.clip_mode!r}: not of {CLIP_MODES}"
        assert self.clip_mode == "none" or self.clip > 0, f"clip {self.clip}: need above 0"
        assert self.top_k >= 0, f"top_k {self.top_k}: need at least 0 (0: all entries)"


class DivergenceOutput(NamedTuple):
    """Each [n]: nats; fraction of the entries (entry clip) or 0/1 (token clip); nats."""

    per_token: Tensor
    clipped: Tensor
    teacher_entropy: Tensor


def _keep_top(student: Tensor, teacher: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if top_k == 0 or top_k >= teacher.shape[-1]:
        return student, teacher
    index = teacher.topk(top_k, dim=-1).indices
    return student.gather(-1, index), teacher.gather(-1, index)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec
) -> DivergenceOutput:
    """student and teacher logits [n, v] -> per-token divergence, OPSD's output loss.

    m = (1-beta) p_S + beta p_T; beta KL(p_T || m) + (1-beta) KL(p_S || m), both distributions at
    ``spec.temperature``, no temperature squared.  Logits of -inf exclude an entry from both.
    """
    student, teacher = (
        (x if x.dtype is torch.float64 else x.float()) / spec.temperature
        for x in (student_logits, teacher_logits.detach())
    )
    student, teacher = _keep_top(student, teacher, spec.top_k)
    present = torch.isfinite(student) & torch.isfinite(teacher)
    # log of an excluded entry: any finite number will do, as its terms are masked out.
    log_s = student.log_softmax(-1).masked_fill(~present, 0.0)
    log_t = teacher.log_softmax(-1).masked_fill(~present, 0.0)
    terms = jsd_terms(log_s, log_t, spec.beta).masked_fill(~present, 0.0)
    entropy = -(log_t.exp() * log_t).masked_fill(~present, 0.0).sum(-1)
    if spec.clip_mode == "entry":
        clipped = (terms > spec.clip).sum(-1) / present.sum(-1)
        return DivergenceOutput(terms.clamp(max=spec.clip).sum(-1), clipped, entropy)
    total = terms.sum(-1)
    if spec.clip_mode == "token":
        return DivergenceOutput(
            total.clamp(max=spec.clip), (total > spec.clip).to(total.dtype), entropy
        )
    return DivergenceOutput(total, torch.zeros_like(total), entropy)


def policy_gradient_loss(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Log-probabilities of the sampled tokens [n] -> OPSD's sampled-token form [n].

    -A log p_S(y_t), A = log p_T(y_t) - log p_S(y_t) without gradient.
    """
    advantage = (teacher_logprobs - student_logprobs).detach()
    return -advantage * student_logprobs
