"""Base models: a supervised warm start that ends where a part of the problems is solved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.model import Stack, initial
from benchmarks.study.task import Problems
from benchmarks.study.train import BATCH, AdamW, Run, learning_rate, solved, supervised_loss

_STEPS, _RATE, _WARMUP = 1500, 1e-3, 50
_LOOK = 10  # steps between two evaluations


def warm_start(
    config: Mapping[str, Any], train: Problems, heldout: Problems, level: float, count: int
) -> tuple[Tensor, list[tuple[int, float]]]:
    """``count`` models of other seeds, each as it was when it first solved ``level`` of 1.

    Rows [count, P], and of each (steps, part that it solves).  As in the embedded task's warm
    start, a step has each problem twice, behind the student's and behind the teacher's prompt.
    """
    flat = initial(config, list(range(count)))
    models, optimizer = Stack(config, flat, trainable=True), AdamW(flat)
    draws = [torch.Generator().manual_seed(i) for i in range(count)]
    found: dict[int, tuple[Tensor, int, float]] = {}
    both = train.student, train.teacher("solution")
    for done in range(_STEPS):
        index = torch.stack([torch.randperm(len(both[0]), generator=g)[:BATCH] for g in draws])
        losses = [supervised_loss(models, p[index], train.reference[index]) for p in both]
        rate = learning_rate(Run(0, 0, _RATE, _WARMUP), done, _STEPS)
        optimizer.step(
            models.gradient(torch.stack(losses).mean(0).sum()), torch.full((count,), rate)
        )
        if (done + 1) % _LOOK:
            continue
        for i, part in enumerate(solved(flat, config, heldout).float().mean(1).tolist()):
            if part >= level and i not in found:
                found[i] = flat[i].clone(), done + 1, part
        if len(found) == count:
            break
    if len(found) < count:
        raise RuntimeError(f"{count - len(found)} models did not reach {level} in {_STEPS} steps")
    rows = [found[i] for i in range(count)]
    return torch.stack([row for row, _, _ in rows]), [(steps, part) for _, steps, part in rows]
