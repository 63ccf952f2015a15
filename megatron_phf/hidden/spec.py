"""Which parts of the flow loss a run trains on: PHF itself, or one of its ablations.

Standard library only: the checks before launch use it, and so does ``megatron_phf.losses``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

FLOW_TERMS = ("direction", "geometry", "adjacent")
FLOW_STATES = ("transitions", "positions")


@dataclass(frozen=True)
class FlowSpec:
    """The default is PHF (arXiv:2606.29340); the rest are what it was compared with.

    ``terms``: those in the loss.  L_layer is the mean of the local terms (direction, geometry)
    that are left, and L_flow the mean of L_local and L_adj, or the one that is left.
    ``layers``: the layers (1-based) that count, all where None; a pair counts with both of its.
    ``states``: ``transitions`` are the d_i of the paper; ``positions`` takes the unit hidden states
    themselves instead and their direction term alone, mean over l and i of 1 - cos(h^S, h^T):
    pointwise hidden-state matching.

    Raises:
        ValueError: an unknown or repeated term, layers out of order, or another term at positions.
    """

    terms: tuple[str, ...] = FLOW_TERMS
    layers: tuple[int, ...] | None = None
    states: str = "transitions"

    def __post_init__(self) -> None:
        unknown = [term for term in self.terms if term not in FLOW_TERMS]
        if unknown or not self.terms or len(set(self.terms)) < len(self.terms):
            raise ValueError(
                f"terms {','.join(self.terms)!r}: name some of {', '.join(FLOW_TERMS)}, each once"
            )
        if self.states not in FLOW_STATES:
            raise ValueError(f"states {self.states!r}: choose one of {', '.join(FLOW_STATES)}")
        if self.states == "positions" and self.terms != ("direction",):
            raise ValueError("states 'positions' has the term direction alone")
        if self.layers is not None and (
            not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers))
        ):
            raise ValueError(f"layers {list(self.layers)}: name layers from 1 on, in order")

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError for a layer that the model does not have."""
        if self.layers is not None and self.layers[-1] > num_layers:
            raise ValueError(f"layer {self.layers[-1]}: the student has layers 1 to {num_layers}")


@dataclass(frozen=True)
class FlowWeights:
    """L_flow as a weighted sum of its terms: weights by layer [L], [L], and by pair [L-1]."""

    direction: Sequence[float]
    geometry: Sequence[float]
    adjacent: Sequence[float]


def flow_weights(
    num_layers: int, spec: FlowSpec | None = None, has_direction: bool = True
) -> FlowWeights:
    """The weights of ``spec`` (PHF: L_flow = (mean over L layers + mean over L-1 pairs) / 2).

    Without a pair L_adj is 0, and stays in the mean.

    Args:
        has_direction: False where student and teacher have other hidden sizes.

    Raises:
        ValueError: nothing is left of the loss, or a layer that the model does not have.
    """
    spec = spec or FlowSpec()
    spec.check_layers(num_layers)
    local = [t for t in spec.terms if t == "geometry" or (t == "direction" and has_direction)]
    if not local and "adjacent" not in spec.terms:
        raise ValueError("the direction term needs a teacher of the student's hidden size")
    chosen = set(range(1, num_layers + 1) if spec.layers is None else spec.layers)
    pairs = [
        {layer, after} <= chosen for layer, after in itertools.pairwise(range(1, num_layers + 1))
    ]
    share = 0.5 if local and "adjacent" in spec.terms else 1.0
    layer_weight = share / len(chosen) / max(len(local), 1)
    pair_weight = share / max(sum(pairs), 1) if "adjacent" in spec.terms else 0.0
    direction, geometry = (
        [layer_weight * (term in local and i in chosen) for i in range(1, num_layers + 1)]
        for term in ("direction", "geometry")
    )
    return FlowWeights(direction, geometry, [pair_weight * both for both in pairs])
