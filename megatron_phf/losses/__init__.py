"""The losses of OPSD and PHF on plain tensors; torch is all that this package needs.

In any trainer, with logits [n, v] of the scored response tokens and hidden states [b, m, h] of
each layer at the window::

    positions, valid = window_batch(response_lengths)          # generated positions [b, m]
    output = generalized_jsd(student_logits, teacher_logits, DivergenceSpec(beta=0.5))
    flow = flow_loss(student_hidden, teacher_hidden, valid)    # one [b, m, h] a layer
    loss = output.per_token.mean() + 0.05 * flow.loss

Other terms, as in the ablations: ``flow_loss(..., spec=FlowSpec(("geometry", "cka=0.3")))``, and
``flow.values["geometry"]`` by layer.

Tokens that count more than others: ``token_weights("position", scored)`` [b, r], times
``output.per_token``, and at the window as ``flow_loss(..., token_weights=...)``.

A teacher of another hidden size or depth (same vocabulary)::

    layers = relative_layer_map(len(student_hidden), len(teacher_hidden))
    flow = flow_loss(student_hidden, teacher_hidden, valid, layers)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_phf.hidden.layer_map import relative_layer_map
    from megatron_phf.hidden.loss import FlowTerms, flow_loss
    from megatron_phf.hidden.spec import FlowSpec, flow_weights
    from megatron_phf.hidden.states import directions, gram, transition_counts, unit_states
    from megatron_phf.hidden.term import HiddenTerm
    from megatron_phf.losses.chunked import ChunkedDivergence, chunked_divergence
    from megatron_phf.losses.divergence import (
        DivergenceOutput,
        DivergenceSpec,
        generalized_jsd,
        policy_gradient_loss,
    )
    from megatron_phf.losses.log_probs import chunked_entropy, chunked_log_probs
    from megatron_phf.losses.objectives import CLIP_MODES, OBJECTIVES
    from megatron_phf.losses.weightings import TOKEN_WEIGHTINGS, WeightingOptions, token_weights
    from megatron_phf.losses.window import select_window, window_batch
    from megatron_phf.losses.window_rules import WINDOW_RULES

__all__ = [
    "CLIP_MODES",
    "OBJECTIVES",
    "TOKEN_WEIGHTINGS",
    "WINDOW_RULES",
    "ChunkedDivergence",
    "DivergenceOutput",
    "DivergenceSpec",
    "FlowSpec",
    "FlowTerms",
    "HiddenTerm",
    "WeightingOptions",
    "chunked_divergence",
    "chunked_entropy",
    "chunked_log_probs",
    "directions",
    "flow_loss",
    "flow_weights",
    "generalized_jsd",
    "gram",
    "policy_gradient_loss",
    "relative_layer_map",
    "select_window",
    "token_weights",
    "transition_counts",
    "unit_states",
    "window_batch",
]

# The command line reads the tables of this package without torch, which most of these need.
_MODULES = (
    *("hidden.layer_map", "hidden.loss", "hidden.spec", "hidden.states", "hidden.term"),
    *("losses.chunked", "losses.divergence", "losses.log_probs", "losses.objectives"),
    *("losses.weightings", "losses.window", "losses.window_rules"),
)


def __getattr__(name: str) -> Any:
    for module in _MODULES if name in __all__ else ():
        value = getattr(importlib.import_module(f"megatron_phf.{module}"), name, None)
        if value is not None:
            globals()[name] = value  # found once
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
