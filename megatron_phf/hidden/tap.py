"""The flow loss inside transformer layers: targets from the teacher, loss on the student.

A layer's input is h^{l-1} and its output h^l, the two neighbours that L_adj(l-1, l) relates, so
the whole of L_flow (PHF, arXiv:2606.29340) is a sum of terms that each one layer can compute.  On
the first layer of a pipeline stage the input is what the previous stage sent, and its gradient
goes back through the pipeline's own backward: no communication of ours crosses a stage.  Only the
targets of a teacher with other layers may have to travel, before the student's pass
(:mod:`megatron_phf.hidden.plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_phf.hidden.loss import layer_values
from megatron_phf.hidden.plan import FlowPlan, make_flow_plan
from megatron_phf.hidden.rows import RowPlaces, SequenceShards, gather_rows, with_rows
from megatron_phf.hidden.spec import FlowSpec, flow_weights, terms_of
from megatron_phf.hidden.states import LayerEnds, make_states, number_of_rows
from megatron_phf.hidden.targets import FlowTargets
from megatron_phf.hidden.term import HiddenTerm
from megatron_phf.runtime import device, parallel

# What is compared: a term's ``against`` and its kind of states.
TargetKey = tuple[str, str]


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

    ``places`` [b, m]: of the window's tokens; ``valid`` bool [b, m]: False where a shorter window
    is padded; ``gradient_scale``: what one sequence's L_flow is multiplied with in the training
    objective; ``weights`` [b, m]: of the tokens, None where all count the same.
    """

    places: RowPlaces
    valid: Tensor
    gradient_scale: float
    weights: Tensor | None = None


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


class FlowTap:
    """What the layers of this process record (teacher) or compare with it (student).

    Keyed by (microbatch, layer): the pipeline interleaves microbatches, and activation recompute
    visits a layer again when others have gone through it since.

    Attributes:
        terms: those that are computed, in the order of the first dimension of ``values``.
        weights: of each term in L_flow, by layer or pair.
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
        """``targets``: for each kind of states, and teacher layers, that the terms compare.

        ``layers``: of the model.
        """
        self.terms, self.weights = terms, weights
        self._targets, self._shards = targets, shards
        self._kinds = list(dict.fromkeys(kind for _, kind in targets))
        rows = [[self._weight(term, layer) for term in terms] for layer in range(1, layers + 1)]
        # One copy to the device for all layers and steps: [L, T].
        self._layer_weights = device.from_host(torch.tensor(rows, dtype=torch.float32))
        self._recording = False
        self._windows: dict[int, FlowWindow] = {}
        # A layer's output and its states: the next layer's input, most often.
        self._last: tuple[Tensor, Mapping[str, Tensor]] | None = None
        self.values: dict[tuple[int, int], Tensor] = {}

    def start_recording(self, windows: list[FlowWindow]) -> None:
        """The teacher's pass over microbatches with ``windows`` comes next."""
        self._recording = True
        self._windows = dict(enumerate(windows))
        for (_, kind), targets in self._targets.items():
            sizes = [(len(w.valid), number_of_rows(kind, w.valid.shape[1])) for w in windows]
            targets.start(sizes)

    def finish_recording(self) -> None:
        """The teacher's pass is over; every rank of the pipeline calls it."""
        self._windows = {}  # the student may be read before it is compared
        for targets in self._targets.values():
            targets.exchange()

    def start_comparing(self, windows: list[FlowWindow]) -> None:
        """The student's pass over the same microbatches comes next."""
        self.values, self._recording = {}, False
        self._windows = dict(enumerate(windows))

    def stop(self) -> None:
        """Forget windows and targets; ``values`` stay until the next comparison."""
        self._windows, self._last = {}, None
        for targets in self._targets.values():
            targets.clear()

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

    def _record(
        self, layer: int, microbatch: int, window: FlowWindow, inputs: Tensor, outputs: Tensor
    ) -> None:
        for number, hidden in ((layer - 1, inputs), (layer, outputs)):
            wanted = [k for k, t in self._targets.items() if t.wants(microbatch, number)]
            if wanted:
                rows = gather_rows(hidden, window.places, self._shards)
                states = _states(rows, window, dict.fromkeys(kind for _, kind in wanted))
                for key in wanted:
                    self._targets[key].record(microbatch, number, states[key[1]])

    def _compare(
        self, layer: int, microbatch: int, window: FlowWindow, inputs: Tensor, outputs: Tensor
    ) -> Tensor:
        outputs, rows = with_rows(outputs, window.places, self._shards)
        own = _states(rows, window, self._kinds)
        before = self._last
        kept: dict[str, Tensor] = {}

        def states_before(kind: str) -> Tensor:
            """Those of the layer before, where ``inputs`` is its output itself.

            It is not on the first layer of a stage or of a recomputed piece, whose graph begins
            there.
            """
            if before is not None and before[0] is inputs:
                return before[1][kind]
            if not kept:
                rows = gather_rows(inputs, window.places, self._shards)
                kept.update(_states(rows, window, self._kinds))
            return kept[kind]

        student = LayerEnds(own, states_before)
        teachers = {
            against: _TeacherEnds(self._targets, against, microbatch, layer)
            for against, _ in self._targets
        }
        values = layer_values(self.terms, layer, student, teachers, window.valid, window.weights)
        missing = [term.name for term in self.terms if term.name not in values]
        if missing:
            absent = outputs.new_zeros(len(window.valid), dtype=torch.float32)
            values |= dict.fromkeys(missing, absent)
        terms = torch.stack([values[term.name] for term in self.terms])
        self.values[microbatch, layer] = terms.detach()
        weighted = terms.sum(1) * self._layer_weights[layer - 1]
        loss = weighted.sum() * window.gradient_scale
        # Pipeline stages free their output's data once it is sent, which a view would not allow.
        attached = _AttachLoss.apply(outputs, loss)
        output = make_viewless_tensor(inp=attached, requires_grad=True, keep_graph=True)
        self._last = output, own
        return output

    def _weight(self, term: HiddenTerm, layer: int) -> float:
        weights = self.weights[term.name]
        if term.over == "layer":
            return weights[layer - 1]
        return weights[layer - 2] if layer > 1 else 0.0


def _states(rows: Tensor, window: FlowWindow, kinds: Iterable[str]) -> dict[str, Tensor]:
    """rows [b, m, h] of the window -> [b, n, h] of each kind."""
    return {kind: make_states(kind, rows, window.valid) for kind in kinds}


def make_flow_tap(
    student: Sequence[Any],
    teacher: Sequence[Any],
    layer_map: Sequence[int],
    window_size: int,
    spec: FlowSpec,
    shards: SequenceShards,
) -> FlowTap:
    """The tap for the layers of both models' chunks; every rank of the pipeline calls it."""
    widths = student[0].config.hidden_size, teacher[0].config.hidden_size
    equal = widths[0] == widths[1]
    terms, weights = terms_of(spec, equal), flow_weights(len(layer_map), spec, equal)
    numbers = [
        [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]
        for chunks in (student, teacher)
    ]
    stages = parallel.gather_over_pipeline(numbers)
    last = max(layer for _, teacher_layers in stages for layer in teacher_layers)
    maps = {"mapped": layer_map, "last": [last] * len(layer_map)}

    def plan(against: str, kind: str) -> FlowPlan:
        here = [term for term in terms if (term.against, term.states) == (against, kind)]
        pairs = any(term.over == "pair" for term in here)
        # A student layer needs its products (with itself and with the layer before), or about one
        # teacher layer's states.
        smaller = (1 + pairs) * number_of_rows(kind, window_size) < widths[1]
        return make_flow_plan(
            maps[against],
            [student_layers for student_layers, _ in stages],
            [teacher_layers for _, teacher_layers in stages],
            parallel.pipeline_rank(),
            products=smaller and all(term.compares == "products" for term in here),
            pairs=pairs,
        )

    keys = dict.fromkeys((term.against, term.states) for term in terms)
    targets = {key: FlowTargets(plan(*key), widths[1]) for key in keys}
    return FlowTap(terms, weights, targets, shards, len(layer_map))


def set_flow_tap(chunks: Sequence[Any], tap: FlowTap | None) -> None:
    """Let every layer of ``chunks`` show its ends to ``tap``."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.flow_tap = tap
