"""The moving average behind an EMA teacher: its arithmetic, and what it needs beside itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_phf.runtime import device
from megatron_phf.teacher import average
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


def test_weights_come_to_the_host_with_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of an offloaded teacher's own, which the average then fills."""
    waits: list[str] = []
    monkeypatch.setattr(device, "when_done", lambda: lambda: waits.append("done"))
    here, there = chunk(1), chunk(1)
    plain, offloaded = WeightAverage([here], 0.75), WeightAverage([there], 0.75)
    plain.update([chunk(2)])
    assert waits == []
    monkeypatch.setattr(average, "_fetches", lambda weights, pairs: True)
    offloaded.update([chunk(2)])
    assert waits == ["done"]
    for (_, a), (p, b) in zip(plain.pairs(), offloaded.pairs(), strict=True):
        assert torch.equal(a, b)
        assert p.data_ptr() != b.data_ptr()


def test_only_16_bit_weights_of_another_device_are_fetched() -> None:
    (p, value), *_ = WeightAverage([chunk(1)], 0.75).pairs()
    far = torch.empty_like(p, device="meta")
    assert average._fetches([far], [(p, value)])
    assert not average._fetches([p.data], [(p, value)])
    wide = torch.nn.Parameter(value)  # its own average
    assert not average._fetches([far.float()], [(wide, value)])


def test_weights_are_averaged_one_after_the_other() -> None:
    averages, students = WeightAverage([chunk(1)], 0.999), [chunk(2), chunk(3)]
    wanted = [value.clone() for _, value in averages.pairs()]
    for student in students:
        with Copies() as copies:
            averages.update([student])
        assert copies.most == 1
        torch._foreach_lerp_(wanted, [p.data.float() for p in student.values()], 1 - 0.999)
    for (_, value), all_at_once in zip(averages.pairs(), wanted, strict=True):
        assert torch.equal(value, all_at_once)
