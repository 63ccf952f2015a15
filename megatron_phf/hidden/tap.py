"""The flow loss inside transformer layers: targets from the teacher, loss on the student.

A layer's input is h^{l-1} and its output h^l, the two neighbours that L_adj(l-1, l) relates, so
the whole of L_flow (PHF, arXiv:2606.29340) is a sum of terms that each one layer can compute.  On
the first layer of a pipeline stage the input is what the previous stage sent, and its gradient
goes back through the pipeline's own backward: no communication of ours crosses a stage.  Only the
targets of a teacher with other layers may have to travel, before the student's pass
(:mod:`megatron_phf.model.flow_plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_phf.losses import (
    FlowSpec,
    direction_loss,
    directions,
    flow_weights,
    gram,
    product_loss,
    transition_counts,
    unit_states,
)
from megatron_phf.model.flow_plan import FlowPlan
from megatron_phf.model.flow_targets import FlowTargets
from megatron_phf.model.rows import SequenceShards, gather_rows


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
class FlowWindow:
    """The window of one microbatch in the sequences of one model.

    ``positions`` [b, m]: absolute positions of the window's tokens; ``valid`` bool [b, m]: False
    where a shorter window is padded; ``gradient_scale``: what one sequence's L_flow is multiplied
    with in the training objective; ``cu_seqlens``: of a packed row, see ``model.rows``.
    """

    positions: Tensor
    valid: Tensor
    gradient_scale: float
    cu_seqlens: Tensor | None = None


class FlowTap:
    """What the layers of this process record (teacher) or compare with it (student).

    Keyed by (microbatch, layer): the pipeline interleaves microbatches, and activation recompute
    visits a layer again when others have gone through it since.
    """

    def __init__(
        self, plan: FlowPlan, spec: FlowSpec, widths: tuple[int, int], shards: SequenceShards
    ) -> None:
        """``widths``: hidden sizes of student and teacher; the direction term needs equal ones."""
        self.has_direction = widths[0] == widths[1]
        self.weights = flow_weights(len(plan.layer_map), spec, self.has_direction)
        self.pointwise = spec.states == "positions"
        assert not (plan.products and self.has_direction), "directions are needed themselves"
        self._targets = FlowTargets(plan, widths[1])
        self._shards = shards
        self._recording = False
        self._windows: dict[int, FlowWindow] = {}
        # A layer's output and its directions: the next layer's input, most often.
        self._last: tuple[Tensor, Tensor] | None = None
        self.values: dict[tuple[int, int], Tensor] = {}

    def start_recording(self, windows: list[FlowWindow]) -> None:
        """The teacher's pass over microbatches with ``windows`` comes next."""
        self._recording = True
        self._windows = dict(enumerate(windows))
        dropped = 0 if self.pointwise else 1  # m positions make m - 1 transitions
        self._targets.start([(len(w.valid), w.valid.shape[1] - dropped) for w in windows])

    def finish_recording(self) -> None:
        """The teacher's pass is over; every rank of the pipeline calls it."""
        self._targets.exchange()

    def start_comparing(self, windows: list[FlowWindow]) -> None:
        """The student's pass over the same microbatches comes next."""
        self.values, self._recording = {}, False
        self._windows = dict(enumerate(windows))

    def stop(self) -> None:
        """Forget windows and targets; ``values`` stay until the next comparison."""
        self._windows, self._last = {}, None
        self._targets.clear()

    def visit(self, layer: int, microbatch: int, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Called by layer ``layer`` (1-based, global) with its ends; returns its output.

        inputs, outputs: [s, b, h], or this rank's piece of the sequence.
        """
        window = self._windows.get(microbatch)
        if window is None:
            return outputs
        if self._recording:
            self._record(layer, microbatch, window, inputs, outputs)
        # The first forward of a recomputed layer has no graph; the loss belongs to the second.
        elif torch.is_grad_enabled():
            return self._compare(layer, microbatch, window, inputs, outputs)
        return outputs

    def _directions(self, hidden: Tensor, window: FlowWindow) -> Tensor:
        """What is compared: unit transitions, or unit states."""
        rows = gather_rows(hidden, window.positions, self._shards, window.cu_seqlens)
        return unit_states(rows, window.valid) if self.pointwise else directions(rows, window.valid)

    def _record(
        self, layer: int, microbatch: int, window: FlowWindow, inputs: Tensor, outputs: Tensor
    ) -> None:
        for number, hidden in ((layer - 1, inputs), (layer, outputs)):
            if self._targets.wants(microbatch, number):
                self._targets.record(microbatch, number, self._directions(hidden, window))

    def _compare(
        self, layer: int, microbatch: int, window: FlowWindow, inputs: Tensor, outputs: Tensor
    ) -> Tensor:
        student = self._directions(outputs, window)
        terms = self._terms(layer, microbatch, window, inputs, student)
        self.values[microbatch, layer] = terms.detach()
        weights = (
            self.weights.direction[layer - 1],
            self.weights.geometry[layer - 1],
            self.weights.adjacent[layer - 2] if layer > 1 else 0.0,
        )
        loss = (terms.sum(1) * terms.new_tensor(weights)).sum() * window.gradient_scale
        # Pipeline stages free their output's data once it is sent, which a view would not allow.
        attached = _AttachLoss.apply(outputs, loss)
        output = make_viewless_tensor(inp=attached, requires_grad=True, keep_graph=True)
        self._last = output, student
        return output

    def _input_directions(self, inputs: Tensor, window: FlowWindow) -> Tensor:
        """Those of the layer before, where ``inputs`` is its output itself.

        It is not on the first layer of a stage or of a recomputed piece, whose graph begins there.
        """
        if self._last is not None and self._last[0] is inputs:
            return self._last[1]
        return self._directions(inputs, window)

    def _terms(
        self, layer: int, microbatch: int, window: FlowWindow, inputs: Tensor, student: Tensor
    ) -> Tensor:
        """Direction, geometry and adjacent (to the layer before) terms [3, b], absent ones 0."""
        counts = window.valid.sum(-1) if self.pointwise else transition_counts(window.valid)
        targets = self._targets
        absent = torch.zeros(len(counts), device=student.device)
        direction = geometry = adjacent = absent
        if self.has_direction:
            direction = direction_loss(student, targets.directions(microbatch, layer), counts)
        if not self.pointwise:
            own = targets.products(microbatch, layer, layer)
            geometry = product_loss(gram(student), own, counts)
            if layer > 1:
                before = self._input_directions(inputs, window)
                pair = targets.products(microbatch, layer - 1, layer)
                adjacent = product_loss(before @ student.mT, pair, counts)
        return torch.stack((direction, geometry, adjacent))
