"""Which parts of the flow loss a run trains on: PHF itself, an ablation, or other terms.

Standard library only: the checks before launch use it, and so does ``megatron_phf.losses``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.hidden.term import HiddenTerm, load_term

PHF_TERMS = ("direction", "geometry", "adjacent")


@dataclass(frozen=True)
class FlowSpec:
    """The default is PHF (arXiv:2606.29340); the rest are what it is compared with.

    ``terms``: names of terms (:func:`megatron_phf.hidden.term.load_term`), or ``name=weight``.
    Those without a weight share as the paper's do: L_layer is the mean of the terms over layers,
    L_flow the mean of L_local and L_adj (the mean over pairs), or the one that there is.  A term
    with a weight adds that times its mean over layers (pairs); 0 measures without training.
    ``layers``: the layers (1-based) that count, all where None; a pair counts with both of its.

    Raises:
        ValueError: an unknown or repeated term, a weight that is none, or layers out of order.
    """

    terms: tuple[str, ...] = PHF_TERMS
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        names = [term.name for term, _ in weighted_terms(self.terms)]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"terms {','.join(self.terms)!r}: name at least one, each once")
        if self.layers is not None and (
            not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers))
        ):
            raise ValueError(f"layers {list(self.layers)}: name layers from 1 on, in order")

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError for a layer that the model does not have."""
        if self.layers is not None and self.layers[-1] > num_layers:
            raise ValueError(f"layer {self.layers[-1]}: the student has layers 1 to {num_layers}")


@functools.cache
def weighted_terms(names: tuple[str, ...]) -> tuple[tuple[HiddenTerm, float | None], ...]:
    """``name`` or ``name=weight`` each -> its term, and its weight where one is given."""
    found = []
    for text in names:
        name, given, number = text.partition("=")
        weight = None
        if given:
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not 0 <= weight < math.inf:
                raise ValueError(f"term {text!r}: its weight is not a number from 0 on")
        found.append((load_term(name.strip()), weight))
    return tuple(found)


def terms_of(spec: FlowSpec, equal_widths: bool = True) -> list[HiddenTerm]:
    """The terms that a run computes, in the order of ``spec``.

    Args:
        equal_widths: False where student and teacher have other hidden sizes.
    """
    return [t for t, _ in weighted_terms(spec.terms) if equal_widths or not t.needs_equal_widths]


def flow_weights(
    num_layers: int, spec: FlowSpec | None = None, equal_widths: bool = True
) -> dict[str, Sequence[float]]:
    """L_flow as a weighted sum: weights of each term that can be computed, by layer or pair.

    PHF: L_flow = (mean over L layers + mean over L-1 pairs) / 2.  In a model of one layer L_adj is
    0 and stays in the mean; where the chosen layers have no neighbours it leaves the mean.

    Args:
        equal_widths: False where student and teacher have other hidden sizes.

    Returns:
        name -> [L], or [L-1] of a term over pairs.

    Raises:
        ValueError: nothing is left of the loss, or a layer that the model does not have.
    """
    spec = spec or FlowSpec()
    spec.check_layers(num_layers)
    usable = terms_of(spec, equal_widths)
    if not usable:
        raise ValueError(f"{','.join(spec.terms)} needs a teacher of the student's hidden size")
    chosen = set(range(1, num_layers + 1) if spec.layers is None else spec.layers)
    pairs = [
        {layer, after} <= chosen for layer, after in itertools.pairwise(range(1, num_layers + 1))
    ]
    layers = [i in chosen for i in range(1, num_layers + 1)]
    left = usable if spec.layers is None or any(pairs) else [t for t in usable if t.over == "layer"]
    totals = _term_weights(spec, left)
    weights: dict[str, Sequence[float]] = {}
    for term in usable:
        counted = layers if term.over == "layer" else pairs
        each = totals.get(term.name, 0.0) / max(sum(counted), 1)
        weights[term.name] = [each * counts for counts in counted]
    return weights


def _term_weights(spec: FlowSpec, usable: Sequence[HiddenTerm]) -> Mapping[str, float]:
    """What each term's mean over layers (pairs) is multiplied with in L_flow."""
    given = {term.name: weight for term, weight in weighted_terms(spec.terms)}
    sharing = [term for term in usable if given[term.name] is None]
    over = [term.over for term in sharing]
    half = 0.5 if len(set(over)) == 2 else 1.0
    shares = {term.name: half / over.count(term.over) for term in sharing}
    return {term.name: shares.get(term.name, given[term.name] or 0.0) for term in usable}


def flow_spec(config: Config) -> FlowSpec:
    """Which parts of the flow loss the flags choose.

    Raises:
        ValueError: names the flags that do not go together, or one with an unknown part.
    """
    method = config.method
    try:
        layers = method.phf_layers
        return FlowSpec(
            tuple(term.strip() for term in method.phf_terms.split(",")),
            None if layers is None else tuple(int(word) for word in layers.split(",")),
        )
    except ValueError as error:
        raise ValueError(f"--phf-terms, --phf-layers: {error}") from error
