"""The privileged teacher: a co-located parallel model without optimizer, DDP or gradients."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

from megatron_phf.average import WeightAverage
from megatron_phf.config import Config
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import FlowGPTModel, frozen_copy
from megatron_phf.teacher_lora import AdapterEmaTeacher, BaseModelTeacher


class Teacher(Protocol):
    """Model chunks that read the privileged prompt, and their update after each step."""

    chunks: list[FlowGPTModel]

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Within, ``chunks`` compute with the teacher's weights; every teacher pass runs there."""
        ...

    def update(self, student: list[FlowGPTModel]) -> None:
        """Follow the student's new weights (after an optimizer step)."""
        ...

    def sharded_state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume: empty, or fp32 averages keyed ``teacher.``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what a checkpoint held for :meth:`sharded_state_dict`."""
        ...


class StatelessTeacher:
    """Frozen on a copy of the starting weights, or live on the student's own: nothing to keep."""

    def __init__(self, chunks: list[FlowGPTModel]) -> None:
        self.chunks = chunks

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: the weights are in place."""
        return contextlib.nullcontext()

    def update(self, student: list[FlowGPTModel]) -> None:
        """Nothing."""

    def sharded_state_dict(self) -> dict[str, Any]:
        """Empty: the start of a run makes the teacher again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class EmaTeacher:
    """theta_T <- rho theta_T + (1 - rho) theta_S after each optimizer step, on a copy."""

    def __init__(self, chunks: list[FlowGPTModel], decay: float) -> None:
        self.chunks = chunks
        self.average = WeightAverage(chunks, decay, copy=False)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: the weights are in place."""
        return contextlib.nullcontext()

    def update(self, student: list[FlowGPTModel]) -> None:
        """One step of the average."""
        self.average.update(student)
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for weight, average in self.average.pairs():
            if weight.data.dtype is not average.dtype:  # else they are one tensor
                weight.copy_(average)

    def sharded_state_dict(self) -> dict[str, Any]:
        """The average."""
        return self.average.sharded_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The average of a checkpoint."""
        self.average.load_state_dict(state)
        self._apply()


def make_teacher(student: list[FlowGPTModel], arch: Architecture, config: Config) -> Teacher:
    """The teacher of ``config.method.teacher``, starting at the student's weights."""
    kind = config.method.teacher
    if kind == "live":
        return StatelessTeacher(student)
    if config.lora.lora_rank:
        if kind == "ema":
            return AdapterEmaTeacher(student, config.method.ema_decay)
        return BaseModelTeacher(student)
    copy = frozen_copy(student, arch, config)
    return EmaTeacher(copy, config.method.ema_decay) if kind == "ema" else StatelessTeacher(copy)
