"""The fp32 moving average behind an EMA teacher, of a whole model or of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_phf.model.gpt import FlowGPTModel, wait_for_weights
from megatron_phf.runtime import device
from megatron_phf.weights.sharded import weights_sharded_state_dict

_PREFIX = "teacher."
Pair = tuple[Parameter, Tensor]  # of a model, its average


class WeightAverage:
    """average <- decay average + (1 - decay) weights, in fp32.

    In fp32: at a decay of 0.999 a bf16 weight would round nearly every update away.

    Args:
        chunks: whose parameters the average starts from, and is laid out as.
        select: which of them, by name within their chunk.
        copy: False lets an fp32 parameter be its own average.
    """

    def __init__(
        self,
        chunks: list[FlowGPTModel],
        decay: float,
        select: Callable[[str], bool] = lambda name: True,
        copy: bool = True,
    ) -> None:
        self._chunks, self._decay, self._select = chunks, decay, select
        self._values = [
            {name: p.data.to(torch.float32, copy=copy) for name, p in self._selected(chunk)}
            for chunk in chunks
        ]

    def _selected(self, chunk: FlowGPTModel) -> Iterator[tuple[str, Parameter]]:
        return ((name, p) for name, p in chunk.named_parameters() if self._select(name))

    def pairs(self) -> list[Pair]:
        """(parameter of ``chunks``, its average)."""
        return [
            (p, values[name])
            for chunk, values in zip(self._chunks, self._values, strict=True)
            for name, p in self._selected(chunk)
        ]

    @torch.no_grad()
    def update(self, student: list[FlowGPTModel]) -> None:
        """One step towards the weights of ``student``, chunks of the same layout."""
        wait_for_weights(student)
        weights = [p.data for chunk in student for _, p in self._selected(chunk)]
        pairs = self.pairs()
        # An offloaded teacher's average is on the host, and is updated there.
        if _fetches(weights[:1], pairs[:1]):
            weights = [p.data.copy_(w, non_blocking=True) for w, (p, _) in _both(weights, pairs)]
            device.when_done()()  # one wait for all of them
        # One after the other: fp32 copies of all bf16 weights at a time would be a step's peak.
        for weight, (_, average) in _both(weights, pairs):
            average.lerp_(weight.to(average.device, torch.float32), 1.0 - self._decay)

    def sharded_state_dict(self) -> dict[str, Any]:
        """For megatron-core's dist_checkpointing: one entry a chunk, keys prefixed ``teacher.``."""
        state = {}
        whole = weights_sharded_state_dict(self._chunks, _PREFIX)
        for i, (entries, values) in enumerate(zip(whole.values(), self._values, strict=True)):
            state[f"chunk{i}"] = {
                key: _with_data(entries[key], value)
                for key, value in ((_PREFIX + name, value) for name, value in values.items())
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place, what dist_checkpointing read for :meth:`sharded_state_dict`."""
        for i, values in enumerate(self._values):
            for name, average in values.items():
                average.copy_(state[f"chunk{i}"][_PREFIX + name])


def _both(weights: list[Tensor], pairs: list[Pair]) -> Iterator[tuple[Tensor, Pair]]:
    return zip(weights, pairs, strict=True)


def _fetches(weights: list[Tensor], pairs: list[Pair]) -> bool:
    """Whether weights come from another device, and the teacher's own, made anew, can hold them."""
    return any(
        weight.device != p.device and weight.dtype is p.dtype is not average.dtype
        for weight, (p, average) in _both(weights, pairs)
    )


def _with_data(entry: Any, data: Tensor) -> Any:
    """A ShardedTensor, or a factory of some, for ``data`` in place of the model's weight."""
    entry.data = data
    if hasattr(entry, "dtype"):
        entry.dtype = data.dtype
    return entry
