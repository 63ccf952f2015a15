"""The student's side of the flow loss: each layer compares its ends with the teacher's targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_phf.hidden.loss import layer_values
from megatron_phf.hidden.rows import SequenceShards, gather_rows, with_rows
from megatron_phf.hidden.states import LayerEnds
from megatron_phf.hidden.targets import FlowTargets, FlowWindow, TargetKey
from megatron_phf.hidden.term import STATES, HiddenTerm, states_of
from megatron_phf.runtime import device


class _AttachLoss(torch.autograd.Function):
    """Pass ``activation`` through; in backward the attached ``loss`` gets the gradient one."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


@dataclass(frozen=True)
class _TeacherEnds:
    """The targets at one student layer, of the terms compared ``against`` one teacher layer."""

    targets: Mapping[TargetKey, FlowTargets]
    against: str
    microbatch: int
    layer: int

    def states(self, kind: str) -> Tensor:
        return self.targets[self.against, kind].states(self.microbatch, self.layer)

    def products(self, kind: str, over: str) -> Tensor:
        first = self.layer if over == "layer" else self.layer - 1
        targets = self.targets[self.against, kind]
        return targets.products(self.microbatch, first, self.layer)


class Comparison:
    """The terms at every layer of this process, and their gradients.

    Keyed by (microbatch, layer): the pipeline interleaves microbatches, and activation recompute
    visits a layer again when others have gone through it since.

    Attributes:
        values: terms [T, b] by (microbatch, layer); a term over pairs is that with the layer
            before, 0 on layer 1.
    """

    def __init__(
        self,
        terms: Sequence[HiddenTerm],
        weights: Mapping[str, Sequence[float]],
        targets: Mapping[TargetKey, FlowTargets],
        shards: SequenceShards,
        layers: int,
    ) -> None:
        """``weights``: of each term in L_flow, by layer or pair; ``layers``: of the model."""
        self._terms, self._targets, self._shards = terms, targets, shards
        self._kinds = {kind: STATES[kind] for _, kind in targets}
        rows = [
            [_layer_weight(term, weights[term.name], layer) for term in terms]
            for layer in range(1, layers + 1)
        ]
        # One copy to the device for all layers and steps: [L, T].
        self._layer_weights = device.from_host(torch.tensor(rows, dtype=torch.float32))
        # A layer's output and its states: the next layer's input, most often.
        self._last: tuple[Tensor, Mapping[str, Tensor]] | None = None
        self.values: dict[tuple[int, int], Tensor] = {}

    def start(self) -> None:
        """The student's pass comes next."""
        self.values = {}

    def stop(self) -> None:
        """Forget all but ``values``."""
        self._last = None

    def visit(
        self, layer: int, microbatch: int, window: FlowWindow, inputs: Tensor, outputs: Tensor
    ) -> Tensor:
        """The ends of layer ``layer`` -> its output, with the layer's loss attached."""
        outputs, rows = with_rows(outputs, window.places, self._shards)
        states = states_of(self._kinds, rows, window.valid)
        student = LayerEnds(states, self._states_before(inputs, window))
        teachers = {
            against: _TeacherEnds(self._targets, against, microbatch, layer)
            for against, _ in self._targets
        }
        values = layer_values(self._terms, layer, student, teachers, window.valid, window.weights)
        missing = [term.name for term in self._terms if term.name not in values]
        if missing:  # layer 1 has no pair
            absent = outputs.new_zeros(len(window.valid), dtype=torch.float32)
            values |= dict.fromkeys(missing, absent)
        terms = torch.stack([values[term.name] for term in self._terms])
        self.values[microbatch, layer] = terms.detach()
        weighted = terms.sum(1) * self._layer_weights[layer - 1]
        loss = weighted.sum() * window.gradient_scale
        # Pipeline stages free their output's data once it is sent, which a view would not allow.
        attached = _AttachLoss.apply(outputs, loss)
        output = make_viewless_tensor(inp=attached, requires_grad=True, keep_graph=True)
        self._last = output, states
        return output

    def _states_before(self, inputs: Tensor, window: FlowWindow) -> Callable[[str], Tensor]:
        """The states of the layer before, made once, by kind.

        Those of ``inputs`` are at hand where they are that layer's output itself.  They are not on
        the first layer of a stage or of a recomputed piece, whose graph begins there.
        """
        if self._last is not None and self._last[0] is inputs:
            return self._last[1].__getitem__

        @functools.cache
        def of_inputs() -> Mapping[str, Tensor]:
            rows = gather_rows(inputs, window.places, self._shards)
            return states_of(self._kinds, rows, window.valid)

        return lambda kind: of_inputs()[kind]


def _layer_weight(term: HiddenTerm, weights: Sequence[float], layer: int) -> float:
    if term.over == "layer":
        return weights[layer - 1]
    return weights[layer - 2] if layer > 1 else 0.0
