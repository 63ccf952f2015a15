"""The flow loss on whole hidden states, and what one layer adds to it; torch only.

The layers of a parallel model (:mod:`megatron_phf.hidden.tap`) and :func:`flow_loss` on plain
tensors call the same :func:`layer_values`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_phf.hidden.layer_map import check_layer_map
from megatron_phf.hidden.row_weights import Ends, WeightedEnds, counted, row_map
from megatron_phf.hidden.spec import FlowSpec, flow_weights, terms_of
from megatron_phf.hidden.states import LayerEnds
from megatron_phf.hidden.term import HiddenTerm, states_of


def layer_values(
    terms: Sequence[HiddenTerm],
    layer: int,
    student: Ends,
    teachers: Mapping[str, Ends],
    valid: Tensor,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each term's values [b] at layer ``layer`` (1-based); pairs are those with the layer before.

    On layer 1 no term over pairs has any.  ``teachers``: by what terms are compared ``against``;
    ``weights`` [b, m]: of the window's tokens (None: all the same).
    """
    values = {}
    if weights is not None:
        valid = counted(weights, valid)
        maps = {t.states: row_map(t.kind, weights, valid) for t in terms}
        student = WeightedEnds(student, maps)
        teachers = {against: WeightedEnds(ends, maps) for against, ends in teachers.items()}
    counts = {t.states: t.kind.counts(valid) for t in terms}
    for term in terms:
        if term.over == "pair" and layer == 1:
            continue
        teacher = teachers[term.against]
        if term.compares == "states":
            both = student.states(term.states), teacher.states(term.states)
        else:
            both = (
                student.products(term.states, term.over),
                teacher.products(term.states, term.over),
            )
        values[term.name] = term.value(*both, counts[term.states])
    return values


@dataclass(frozen=True)
class FlowTerms:
    """``loss`` = L_flow [], mean over sequences, and the terms that it is made of, likewise means.

    ``values``: by a term's name, [L], or [L-1] of a term over pairs; without those that need equal
    hidden sizes where student and teacher have other ones.
    ``short_sequences``: how many had too few window positions for a term; they contribute zero
    to it and stay in the means.
    """

    loss: Tensor
    values: Mapping[str, Tensor]
    short_sequences: int

    def mean(self, name: str) -> Tensor:
        """A term's mean over layers or pairs; 0 without any."""
        values = self.values[name]
        return values.mean() if len(values) else self.loss.new_zeros(())


def flow_loss(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    valid: Tensor,
    layer_map: Sequence[int] | None = None,
    spec: FlowSpec | None = None,
    token_weights: Tensor | None = None,
) -> FlowTerms:
    """Hidden states of all layers at the window, each [b, m, h]; valid bool [b, m] -> L_flow.

    The teacher is detached.  It may have another hidden size (no direction term then: L_layer is
    L_geo alone) and, with a layer map, another number of layers.

    Args:
        layer_map: the teacher layer (1-based) of each student layer, not decreasing, for example
            ``relative_layer_map(len(student_hidden), len(teacher_hidden))``; None: layer by layer.
        spec: which terms; None: those of PHF.
        token_weights: of the window's tokens [b, m]; None: all count the same.

    Raises:
        ValueError: no layers, a map or layers that do not fit, different numbers of layers without
            a map, or nothing left of the loss.
    """
    spec = spec or FlowSpec()
    mapped = _mapped_layers(student_hidden, teacher_hidden, layer_map)
    equal_widths = student_hidden[0].shape[-1] == mapped[0].shape[-1]
    terms = terms_of(spec, equal_widths)
    weights = flow_weights(len(student_hidden), spec, equal_widths)
    kinds = {term.states: term.kind for term in terms}
    student = _ends([states_of(kinds, h, valid) for h in student_hidden])
    teacher = _ends([states_of(kinds, h.detach(), valid) for h in mapped])
    of_last = {term.states: term.kind for term in terms if term.against == "last"}
    last = LayerEnds(states_of(of_last, teacher_hidden[-1].detach(), valid))
    found: dict[str, list[Tensor]] = {term.name: [] for term in terms}
    for layer, (own, ends) in enumerate(zip(student, teacher, strict=True), 1):
        teachers = {"mapped": ends, "last": last}
        for name, value in layer_values(terms, layer, own, teachers, valid, token_weights).items():
            found[name].append(value.mean())
    zero = torch.zeros((), device=valid.device)
    values = {name: torch.stack(x) if x else zero.new_zeros(0) for name, x in found.items()}
    loss = sum((v * v.new_tensor(weights[name])).sum() for name, v in values.items())
    short = torch.stack([kind.counts(valid) == 0 for kind in kinds.values()]).any(0)
    return FlowTerms(zero + loss, values, int(short.sum()))


def _ends(states: Sequence[Mapping[str, Tensor]]) -> list[LayerEnds]:
    """States by kind of each layer -> the ends of each layer."""
    before = [None, *(each.__getitem__ for each in states[:-1])]
    return [LayerEnds(*ends) for ends in zip(states, before, strict=True)]


def _mapped_layers(
    student: Sequence[Tensor], teacher: Sequence[Tensor], layer_map: Sequence[int] | None
) -> list[Tensor]:
    """The teacher's layer for each of the student's."""
    if not student or not teacher or (layer_map is None and len(student) != len(teacher)):
        raise ValueError(
            f"{len(student)} student and {len(teacher)} teacher layers: give the same number, at "
            "least one, or a layer_map (relative_layer_map)"
        )
    if layer_map is None:
        return list(teacher)
    check_layer_map(layer_map, len(student), len(teacher))
    return [teacher[k - 1] for k in layer_map]
