"""The moving average behind an EMA teacher: its arithmetic, and what it needs beside itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_phf.teacher.average import WeightAverage


class Chunk(torch.nn.ParameterDict):
    """Weights that are all here (see ``wait_for_weights``)."""

    arriving: Callable[[], None] | None = None


def chunk(seed: int) -> Chunk:
    torch.manual_seed(seed)
    weights = {name: torch.randn(31, 7).bfloat16() for name in "abcde"}
    return Chunk({name: torch.nn.Parameter(weight) for name, weight in weights.items()})


class Copies(TorchDispatchMode):
    """Counts the fp32 copies of weights that exist at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.dtype is torch.float32:
            self._alive = [ref for ref in (*self._alive, weakref.ref(made)) if ref() is not None]
            self.most = max(self.most, len(self._alive))
        return made


def test_weights_are_averaged_one_after_the_other() -> None:
    average, students = WeightAverage([chunk(1)], 0.999), [chunk(2), chunk(3)]
    wanted = [value.clone() for _, value in average.pairs()]
    for student in students:
        with Copies() as copies:
            average.update([student])
        assert copies.most == 1
        torch._foreach_lerp_(wanted, [p.data.float() for p in student.values()], 1 - 0.999)
    for (_, value), all_at_once in zip(average.pairs(), wanted, strict=True):
        assert torch.equal(value, all_at_once)
