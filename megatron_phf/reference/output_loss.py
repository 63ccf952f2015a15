"""The output losses of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_phf.reference.options import Options


def divergence(student: Tensor, teacher: Tensor, o: Options) -> tuple[Tensor, float, float]:
    """Logits [v] of one token -> (divergence [], clipped fraction, teacher entropy)."""
    student, teacher = student / o.temperature, teacher / o.temperature
    if o.top_k:
        kept = torch.topk(teacher, o.top_k).indices
        student, teacher = student[kept], teacher[kept]
    p_s, p_t = torch.softmax(student, 0), torch.softmax(teacher, 0)
    if o.beta == 0:
        terms = p_t * (p_t.log() - p_s.log())
    elif o.beta == 1:
        terms = p_s * (p_s.log() - p_t.log())
    else:
        m = (1 - o.beta) * p_s + o.beta * p_t
        terms = o.beta * p_t * (p_t.log() - m.log()) + (1 - o.beta) * p_s * (p_s.log() - m.log())
    entropy = float(-(p_t * p_t.log()).sum())
    if o.clip_mode == "entry":
        clipped = float((terms > o.clip).double().mean())
        return terms.clamp(max=o.clip).sum(), clipped, entropy
    total = terms.sum()
    if o.clip_mode == "token":
        over = bool(total > o.clip)
        return total.clamp(max=o.clip), float(over), entropy
    return total, 0.0, entropy


def importance(student: Tensor, token: int, sampler: float, o: Options) -> tuple[float, float]:
    """Logits [v], the token that was sampled and its log-probability then -> (weight, clipped)."""
    assert o.ratio_cap is not None
    ratio = float((torch.log_softmax(student, 0)[token].detach() - sampler).exp())
    return min(ratio, o.ratio_cap), float(ratio > o.ratio_cap)


def sampled_token(
    student: Tensor, teacher: Tensor, token: int, o: Options
) -> tuple[Tensor, float, float]:
    """OPSD's policy-gradient form for one token."""
    log_s = torch.log_softmax(student / o.temperature, 0)[token]
    log_p = torch.log_softmax(teacher / o.temperature, 0)
    advantage = (log_p[token] - log_s).detach()
    return -advantage * log_s, 0.0, float(-(log_p.exp() * log_p).sum())


def cross_entropy(
    student: Tensor, teacher: Tensor, token: int, o: Options
) -> tuple[Tensor, float, float]:
    """Supervised fine-tuning on one token; the teacher counts for its entropy alone."""
    log_p = torch.log_softmax(teacher / o.temperature, 0)
    loss = -torch.log_softmax(student / o.temperature, 0)[token]
    return loss, 0.0, float(-(log_p.exp() * log_p).sum())


def observed(student: Tensor, teacher: Tensor, o: Options) -> tuple[float, float]:
    """Logits [v] of one token -> the student's entropy, and 1 where both choose alike, else 0."""
    if o.top_k:
        kept = torch.topk(teacher, o.top_k).indices
        student, teacher = student[kept], teacher[kept]
    p = torch.softmax(student.detach() / o.temperature, 0)
    return float(-(p * p.log()).sum()), float(student.argmax() == teacher.argmax())
