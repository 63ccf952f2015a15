"""Weights of the tokens of one response, and the hidden-state losses under them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from megatron_phf.reference.hidden import relative_depth
from megatron_phf.reference.options import Options
from megatron_phf.reference.output_loss import divergence


def _entropy(logits: Tensor, o: Options) -> float:
    log_p = torch.log_softmax(logits.detach() / o.temperature, 0)
    return float(-(log_p.exp() * log_p).sum())


def token_weights(pairs: list[tuple[Tensor, Tensor]], o: Options) -> list[float]:
    """Logits of student and teacher, [v] each, of a response's trained tokens -> their weights."""
    n = len(pairs)
    if o.token_weighting == "position":
        places = [(i + 0.5) / n for i in range(n)]
        return [0.25 + 0.75 / (1 + math.exp(-(u - 0.3) / 0.1)) for u in places]
    if o.token_weighting == "teacher_entropy":
        return [1.0 + (_entropy(t, o) > o.token_entropy_threshold) for _, t in pairs]
    if o.token_weighting == "student_entropy":
        values = [_entropy(s, o) for s, _ in pairs]
    else:
        assert o.token_weighting == "divergence_top_p"
        whole = dataclasses.replace(o, clip_mode="none")
        values = [float(divergence(s.detach(), t, whole)[0]) for s, t in pairs]
    kept = math.ceil(n * o.token_keep_fraction - 1e-6)
    best = sorted(range(n), key=lambda i: (-values[i], i))[:kept]
    return [n / kept if i in best else 0.0 for i in range(n)]


def _paired(w: Tensor, value: Tensor) -> Tensor:
    """The mean of [n, n] over pairs of rows."""
    return (w[:, None] * w[None] * value).sum() / w.sum() ** 2


def _transitions(hidden: Tensor) -> Tensor:
    delta = hidden.float().diff(dim=0)
    return delta / delta.norm(dim=1, keepdim=True)


def _centred(hidden: Tensor, w: Tensor) -> Tensor:
    hidden = hidden.float()
    return hidden - (w[:, None] * hidden).sum(0) / w.sum()


def _unlike(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """1 - the cosine of two [n, n] under weights of pairs."""
    square = _paired(w, x * x) * _paired(w, y * y)
    return 1 - _paired(w, x * y) / square.sqrt() if square > 0 else torch.zeros(())


def _layer_value(name: str, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """One term of one layer; ``t`` of the teacher."""
    v = (w[1:] + w[:-1]) / 2
    of = v if name in ("direction", "geometry") else w
    few = name == "cka" and int((w > 0).sum()) < 2
    if len(of) == 0 or float(of.sum()) == 0 or few:
        return torch.zeros(())
    distance = ((s.float() - t.float()) ** 2).sum(1)
    cosine = torch.nn.functional.cosine_similarity
    if name == "direction":
        return (v * (1 - (_transitions(s) * _transitions(t)).sum(1))).sum() / v.sum()
    if name == "geometry":
        x, y = _transitions(s), _transitions(t)
        return _paired(v, (x @ x.T - y @ y.T) ** 2)
    if name in ("pointwise", "last_layer"):
        return (w * (1 - cosine(s.float(), t.float(), dim=1))).sum() / w.sum()
    if name == "mse":
        return (w * distance).sum() / w.sum() / s.shape[1]
    if name == "nmse":
        return (w * distance).sum() / (w * (t.float() ** 2).sum(1)).sum()
    assert name == "cka"
    x, y = _centred(s, w), _centred(t, w)
    return _unlike(x @ x.T, y @ y.T, w)


def _pair_value(name: str, s: list[Tensor], t: list[Tensor], w: Tensor) -> Tensor:
    """One term of two neighbouring layers."""
    if name == "adjacent":
        v = (w[1:] + w[:-1]) / 2
        if len(v) == 0 or float(v.sum()) == 0:
            return torch.zeros(())
        x, y = (_transitions(h[0]) @ _transitions(h[1]).T for h in (s, t))
        return _paired(v, (x - y) ** 2)
    assert name == "cka_adjacent"
    if int((w > 0).sum()) < 2:
        return torch.zeros(())
    x, y = (_centred(h[0], w) @ _centred(h[1], w).T for h in (s, t))
    return _unlike(x, y, w)


def weighted_terms(
    student: list[Tensor], teacher: list[Tensor], w: Tensor, o: Options
) -> dict[str, list[Tensor] | None]:
    """Every term that ``o`` names of states [m, h] a layer under weights ``w`` [m].

    A mean over positions, or pairs of positions, has their weights; a transition has the mean of
    its ends'.  Of equal widths alone.
    """
    mapped = [teacher[k - 1] for k in o.layer_map or relative_depth(len(student), len(teacher))]
    values: dict[str, list[Tensor] | None] = {}
    for name in (t.split("=")[0] for t in o.terms.split(",")):
        if name in ("adjacent", "cka_adjacent"):
            values[name] = [
                _pair_value(name, student[i : i + 2], mapped[i : i + 2], w)
                for i in range(len(student) - 1)
            ]
            continue
        against = [teacher[-1]] * len(student) if name == "last_layer" else mapped
        values[name] = [_layer_value(name, s, t, w) for s, t in zip(student, against, strict=True)]
    return values
