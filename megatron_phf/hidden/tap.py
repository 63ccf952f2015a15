"""The flow loss inside transformer layers: targets from the teacher, loss on the student.

A layer's input is h^{l-1} and its output h^l, the two neighbours that L_adj(l-1, l) relates, so
the whole of L_flow (PHF, arXiv:2606.29340) is a sum of terms that each one layer can compute.  On
the first layer of a pipeline stage the input is what the previous stage sent, and its gradient
goes back through the pipeline's own backward: no communication of ours crosses a stage.  Only the
targets of a teacher with other layers may have to travel, before the student's pass
(:mod:`megatron_phf.hidden.plan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_phf.hidden.compare import Comparison
from megatron_phf.hidden.plan import FlowPlan, make_flow_plan
from megatron_phf.hidden.rows import SequenceShards, gather_rows
from megatron_phf.hidden.spec import FlowSpec, flow_weights, terms_of
from megatron_phf.hidden.targets import FlowTargets, FlowWindow, TargetKey
from megatron_phf.hidden.term import STATES, HiddenTerm, states_of
from megatron_phf.runtime import parallel


class FlowTap:
    """What the layers of this process show their ends to: to record, or to compare with it.

    Attributes:
        terms: those that are computed, in the order of the first dimension of ``values``.
        weights: of each term in L_flow, by layer or pair.
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
        self._comparison = Comparison(terms, weights, targets, shards, layers)
        self._recording = False
        self._windows: dict[int, FlowWindow] = {}

    @property
    def values(self) -> dict[tuple[int, int], Tensor]:
        """See ``Comparison.values``."""
        return self._comparison.values

    def start_recording(self, windows: list[FlowWindow]) -> None:
        """The teacher's pass over microbatches with ``windows`` comes next."""
        self._recording, self._windows = True, dict(enumerate(windows))
        for targets in self._targets.values():
            targets.start(windows)

    def finish_recording(self) -> None:
        """The teacher's pass is over; every rank of the pipeline calls it."""
        self._windows = {}  # the student may be read before it is compared
        for targets in self._targets.values():
            targets.exchange()

    def start_comparing(self, windows: list[FlowWindow]) -> None:
        """The student's pass over the same microbatches comes next."""
        self._recording, self._windows = False, dict(enumerate(windows))
        self._comparison.start()

    def stop(self) -> None:
        """Forget windows and targets; ``values`` stay until the next comparison."""
        self._windows = {}
        self._comparison.stop()
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
            self._record(microbatch, window, {layer - 1: inputs, layer: outputs})
        # The first forward of a recomputed layer has no graph; the loss belongs to the second.
        elif torch.is_grad_enabled():
            return self._comparison.visit(layer, microbatch, window, inputs, outputs)
        return outputs

    def _record(self, microbatch: int, window: FlowWindow, ends: Mapping[int, Tensor]) -> None:
        for layer, hidden in ends.items():
            wanted = [key for key, t in self._targets.items() if t.wants(microbatch, layer)]
            if wanted:
                rows = gather_rows(hidden, window.places, self._shards)
                kinds = {kind: STATES[kind] for _, kind in wanted}
                states = states_of(kinds, rows, window.valid)
                for key in wanted:
                    self._targets[key].record(microbatch, layer, states[key[1]])


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
        rows, width = STATES[kind].rows(window_size), STATES[kind].width(widths[1])
        smaller = (1 + pairs) * rows < width
        return make_flow_plan(
            maps[against],
            [student_layers for student_layers, _ in stages],
            [teacher_layers for _, teacher_layers in stages],
            parallel.pipeline_rank(),
            products=smaller and all(term.compares == "products" for term in here),
            pairs=pairs,
        )

    keys = dict.fromkeys((term.against, term.states) for term in terms)
    targets = {key: FlowTargets(plan(*key), STATES[key[1]], widths[1]) for key in keys}
    return FlowTap(terms, weights, targets, shards, len(layer_map))


def set_flow_tap(chunks: Sequence[Any], tap: FlowTap | None) -> None:
    """Let every layer of ``chunks`` show its ends to ``tap``."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.flow_tap = tap
