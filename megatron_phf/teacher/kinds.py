"""The privileged teacher: a co-located parallel model without optimizer, DDP or gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_directories
from megatron_phf.lora.linears import adapters_off
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.fp8 import never_trained
from megatron_phf.model.gpt import FlowGPTModel, build_model, frozen_copy
from megatron_phf.teacher.adapters import AdapterEmaTeacher
from megatron_phf.teacher.architecture import Models, flag_of_teacher, teacher_config
from megatron_phf.teacher.average import WeightAverage
from megatron_phf.teacher.offload import HostWeights, Switch, TakingTurns
from megatron_phf.weights.huggingface import load_hf_weights

# Where a teacher's weights are during its passes; of several teachers, how they take turns there.
Resident = Callable[[], contextlib.AbstractContextManager[Switch | None]]
_always: Resident = contextlib.nullcontext


class Teacher(Protocol):
    """Model chunks that read the privileged prompt, and their update after each step."""

    chunks: list[FlowGPTModel]

    def active(self) -> contextlib.AbstractContextManager[Switch | None]:
        """Within, ``chunks`` compute with the teacher's weights; every teacher pass runs there.

        Of several teachers, with those that each chunk is switched to.
        """
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
    """Frozen on weights of its own, live on the student's, or its base model: nothing to keep."""

    def __init__(self, chunks: list[FlowGPTModel], resident: Resident = _always) -> None:
        self.chunks, self._resident = chunks, resident

    def active(self) -> contextlib.AbstractContextManager[Switch | None]:
        """The weights are in place, or come from the host."""
        return self._resident()

    def update(self, student: list[FlowGPTModel]) -> None:
        """Nothing."""

    def sharded_state_dict(self) -> dict[str, Any]:
        """Empty: the start of a run makes the teacher again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class EmaTeacher:
    """theta_T <- rho theta_T + (1 - rho) theta_S after each optimizer step, on a copy."""

    def __init__(
        self, chunks: list[FlowGPTModel], decay: float, resident: Resident = _always
    ) -> None:
        self.chunks, self._resident = chunks, resident
        self.average = WeightAverage(chunks, decay, copy=False)

    def active(self) -> contextlib.AbstractContextManager[Switch | None]:
        """The weights are in place, or come from the host."""
        return self._resident()

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


def _resident(chunks: list[FlowGPTModel], config: Config) -> Resident:
    return HostWeights(chunks).on_device if config.teacher.teacher_offload else _always


def _other_model(teacher: Architecture, config: Config) -> tuple[list[FlowGPTModel], Resident]:
    """The model of ``--teacher-hf-model``, in the student's layout and with its vocabulary rows."""
    settings, directories = never_trained(teacher_config(config)), teacher_directories(config)
    chunks = build_model(teacher, settings)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)

    def load(name: str) -> None:
        load_hf_weights(chunks, teacher, settings, directories[name], flag_of_teacher(name))

    if len(directories) > 1:
        stay = not config.teacher.teacher_offload
        return chunks, TakingTurns(chunks, tuple(directories), load, stay).on_device
    load(*directories)
    return chunks, _resident(chunks, config)


@dataclass(frozen=True)
class TeacherKind:
    """How a kind of teacher is made; what it has stands in :mod:`.traits`.

    ``on_weights``: of chunks with weights of its own and where these are kept; ``on_adapters``: of
    a student that trains adapters alone, whose base weights it shares; each None where the kind
    has none of its own and is ``on_student``, the student's own weights.
    """

    on_weights: Callable[[list[FlowGPTModel], Config, Resident], Teacher] | None = None
    on_adapters: Callable[[list[FlowGPTModel], Config], Teacher] | None = None
    on_student: Callable[[list[FlowGPTModel]], Teacher] | None = None


# --teacher; its choices stand in the settings, which import nothing.
TEACHERS = {
    "frozen": TeacherKind(
        on_weights=lambda chunks, config, resident: StatelessTeacher(chunks, resident),
        on_adapters=lambda student, config: StatelessTeacher(
            student, lambda: adapters_off(student)
        ),
    ),
    "ema": TeacherKind(
        on_weights=lambda chunks, config, resident: EmaTeacher(
            chunks, config.method.ema_decay, resident
        ),
        on_adapters=lambda student, config: AdapterEmaTeacher(student, config.method.ema_decay),
    ),
    "live": TeacherKind(on_student=StatelessTeacher),
}


def make_teacher(student: list[FlowGPTModel], models: Models, config: Config) -> Teacher:
    """The teacher of ``--teacher``, starting at the student's weights; or another model."""
    kind = TEACHERS[config.method.teacher]
    if kind.on_student is not None:
        return kind.on_student(student)
    if config.lora.lora_rank and models.other is None:
        assert kind.on_adapters is not None
        return kind.on_adapters(student, config)
    if models.other is None:
        chunks = frozen_copy(student, models.student, config)
        resident = _resident(chunks, config)
    else:
        chunks, resident = _other_model(models.other, config)
    assert kind.on_weights is not None
    return kind.on_weights(chunks, config, resident)
