"""Teachers that share the student's base weights: they differ in adapters alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_phf.lora.linears import is_adapter
from megatron_phf.model.gpt import FlowGPTModel
from megatron_phf.teacher.average import WeightAverage


class AdapterEmaTeacher:
    """A second set of adapters: the fp32 average of the student's.  Adds one fp32 copy of them."""

    def __init__(self, student: list[FlowGPTModel], decay: float) -> None:
        self.chunks = student
        self.average = WeightAverage(student, decay, is_adapter)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The average in the adapters' place within.

        Only ``data`` pointers change: DDP's and the optimizer's buffers keep the student's values.
        """
        pairs = self.average.pairs()
        own = [parameter.data for parameter, _ in pairs]
        for parameter, average in pairs:
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for (parameter, _), data in zip(pairs, own, strict=True):
                parameter.data = data

    def update(self, student: list[FlowGPTModel]) -> None:
        """One step of the average."""
        self.average.update(student)

    def sharded_state_dict(self) -> dict[str, Any]:
        """The average."""
        return self.average.sharded_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The average of a checkpoint."""
        self.average.load_state_dict(state)
