"""The hidden-state losses of one sequence, and L_flow made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_phf.reference.options import Options


def window(n: int, size: int, rule: str) -> list[int]:
    """Generated positions that the flow loss looks at."""
    if n <= size:
        return list(range(n))
    if rule == "contiguous":
        return list(range(size))
    return [int(i * (n - 1) / (size - 1) + 0.5) for i in range(size)]


def unit_transitions(hidden: Tensor) -> Tensor:
    """[m, h] -> [m-1, h]."""
    rows = []
    for i in range(hidden.shape[0] - 1):
        delta = hidden[i + 1].float() - hidden[i].float()
        ends = max(float(hidden[i].float().norm()), float(hidden[i + 1].float().norm()))
        still = float(delta.norm()) <= rounding(hidden.dtype) * ends
        rows.append(torch.zeros_like(delta) if still else delta / delta.norm())
    return torch.stack(rows)


def rounding(dtype: torch.dtype) -> float:
    """A transition that is not above this share of its states' norm is rounding, and none."""
    eps = torch.finfo(dtype).eps
    return eps / 2 if eps > 1e-4 else 32 * eps


def relative_depth(student_layers: int, teacher_layers: int) -> list[int]:
    """Student layer l -> teacher layer round(l L_T / L_S), halves up, at least 1."""
    exact = [layer * teacher_layers / student_layers for layer in range(1, student_layers + 1)]
    return [max(1, int(x + 0.5)) for x in exact]


def flow_terms(
    student: list[Tensor], teacher: list[Tensor], layer_map: tuple[int, ...] | None = None
) -> tuple[list, list, list]:
    """Hidden states at the window, [m, h] a layer -> direction, geometry, adjacent values.

    ``layer_map``: the teacher layer (1-based) of each student layer.  Without equal widths there
    are no directions to compare: an empty list.
    """
    teacher = [teacher[k - 1] for k in layer_map or relative_depth(len(student), len(teacher))]
    same_width = student[0].shape[1] == teacher[0].shape[1]
    if student[0].shape[0] < 2:
        zero, number = torch.zeros(()), len(student)
        return [zero] * (number if same_width else 0), [zero] * number, [zero] * (number - 1)
    s, t = [unit_transitions(h) for h in student], [unit_transitions(h) for h in teacher]
    n = s[0].shape[0]
    direction = [sum(1 - (a * b).sum() for a, b in zip(x, y, strict=True)) / n
                 for x, y in zip(s, t, strict=True) if same_width]  # fmt: skip
    geometry = [((x @ x.T - y @ y.T) ** 2).sum() / n**2 for x, y in zip(s, t, strict=True)]
    adjacent = [
        ((s[i] @ s[i + 1].T - t[i] @ t[i + 1].T) ** 2).sum() / n**2 for i in range(len(s) - 1)
    ]
    return direction, geometry, adjacent


def pointwise_terms(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """Cosine distance of the hidden states at the window, mean over it, in each layer."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        distances = [1 - torch.dot(a / a.norm(), b / b.norm()) for a, b in zip(s, t, strict=True)]
        values.append(sum(distances) / len(distances) if distances else torch.zeros(()))
    return values


def cka_terms(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """1 - linear CKA of the hidden states at the window, in each layer, by cross-covariances."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        if len(s) < 2:
            values.append(torch.zeros(()))
            continue
        x, y = (h.float() - h.float().mean(0) for h in (s, t))
        norm = (x.T @ x).norm() * (y.T @ y).norm()
        values.append(1 - (y.T @ x).norm() ** 2 / norm)
    return values


def cka_pair_terms(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """1 - the cosine of both models' products of neighbouring layers' centred states."""
    values = []
    for i in range(len(student) - 1):
        products = []
        for layers in (student, teacher):
            x, y = (h.float() - h.float().sum(0) / max(len(h), 1) for h in layers[i : i + 2])
            products.append((x @ y.T).flatten())
        norm = products[0].norm() * products[1].norm()
        values.append(1 - products[0] @ products[1] / norm if norm > 0 else torch.zeros(()))
    return values


def square_terms(student: list[Tensor], teacher: list[Tensor]) -> tuple[list, list]:
    """Distance of the hidden states in each layer: mean square, and over the teacher's square."""
    mean, relative = [], []
    for s, t in zip(student, teacher, strict=True):
        distance = torch.sum((s.float() - t.float()) ** 2)
        mean.append(distance / max(s.numel(), 1))
        relative.append(distance / torch.sum(t.float() ** 2) if len(s) else torch.zeros(()))
    return mean, relative


def named_terms(
    student: list[Tensor], teacher: list[Tensor], o: Options
) -> dict[str, list[Tensor] | None]:
    """Every term that ``o`` names, by layer or pair; None where it needs equal widths."""
    mapped = [teacher[k - 1] for k in o.layer_map or relative_depth(len(student), len(teacher))]
    direction, geometry, adjacent = flow_terms(student, teacher, o.layer_map)
    same_width = student[0].shape[1] == teacher[0].shape[1]
    mean, relative = square_terms(student, mapped) if same_width else (None, None)
    last = [teacher[-1]] * len(student)
    known = {
        "direction": direction if same_width else None,
        "geometry": geometry,
        "adjacent": adjacent,
        "pointwise": pointwise_terms(student, mapped) if same_width else None,
        "cka": cka_terms(student, mapped),
        "cka_adjacent": cka_pair_terms(student, mapped),
        "mse": mean,
        "nmse": relative,
        "last_layer": pointwise_terms(student, last) if same_width else None,
    }
    return {name: known[name] for name in (t.split("=")[0] for t in o.terms.split(","))}


PAIRS = ("adjacent", "cka_adjacent")


def flow_objective(values: dict[str, list[Tensor] | None], o: Options) -> Tensor:
    """Means over the batch by layer and pair -> L_flow of the chosen terms and layers."""
    weights = {t.split("=")[0]: t.split("=")[1:] for t in o.terms.split(",")}
    number = max(len(v) + (name in PAIRS) for name, v in values.items() if v is not None)
    layers = [i - 1 for i in o.layers or range(1, number + 1)]
    total = torch.zeros(())
    local: list[Tensor] = []
    pairs: list[Tensor] = []
    for name, v in values.items():
        if v is None:
            continue
        kept = [v[i] for i in layers if name not in PAIRS or i + 1 in layers]
        mean = sum(kept) / len(kept) if kept else torch.zeros(())
        if o.layers and name in PAIRS and not kept:
            continue  # of layers without neighbours no pair is left to be a half of the loss
        if weights[name]:
            total = total + float(weights[name][0]) * mean
        else:
            (pairs if name in PAIRS else local).append(mean)
    # Each layer's loss is the mean of its terms: without directions, of the one that is left.
    parts = [sum(means) / len(means) for means in (local, pairs) if means]
    return total + (sum(parts) / len(parts) if parts else 0.0)
