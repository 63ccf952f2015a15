"""The privileged teacher: a co-located parallel model without optimizer, DDP or gradients."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_phf.config import Config
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel, frozen_copy


class Teacher(Protocol):
    """Model chunks that read the privileged prompt, and their update after each step."""

    chunks: list[FlowGPTModel]

    def update(self, student: list[FlowGPTModel]) -> None:
        """Follow the student's new weights (after an optimizer step)."""
        ...


class FrozenTeacher:
    """Keeps the student's starting weights."""

    def __init__(self, chunks: list[FlowGPTModel]) -> None:
        self.chunks = chunks

    def update(self, student: list[FlowGPTModel]) -> None:
        """Nothing."""


class LiveTeacher:
    """The student's own current weights: no second copy."""

    def __init__(self, student: list[FlowGPTModel]) -> None:
        self.chunks = student

    def update(self, student: list[FlowGPTModel]) -> None:
        """Nothing: the weights are the student's."""


class EmaTeacher:
    """theta_T <- rho theta_T + (1 - rho) theta_S after each optimizer step.

    The average is kept in fp32: at rho = 0.999 a bf16 weight would round nearly every update
    away.
    """

    def __init__(self, chunks: list[FlowGPTModel], decay: float) -> None:
        self.chunks = chunks
        self._decay = decay
        self._weights = [p.data for chunk in chunks for p in chunk.parameters()]
        # An fp32 model is its own average; of any other this is the master copy.
        self.average = [w if w.dtype is torch.float32 else w.float() for w in self._weights]

    @torch.no_grad()
    def update(self, student: list[FlowGPTModel]) -> None:
        """One step of the average."""
        new = [p.data.float() for chunk in student for p in chunk.parameters()]
        torch._foreach_lerp_(self.average, new, 1.0 - self._decay)
        for weight, average in zip(self._weights, self.average, strict=True):
            if weight is not average:
                weight.copy_(average)


def make_teacher(student: list[FlowGPTModel], arch: Architecture, config: Config) -> Teacher:
    """The teacher of ``config.method.teacher``, starting at the student's weights."""
    kind = config.method.teacher
    if kind == "live":
        return LiveTeacher(student)
    copy = frozen_copy(student, arch, config)
    return EmaTeacher(copy, config.method.ema_decay) if kind == "ema" else FrozenTeacher(copy)
