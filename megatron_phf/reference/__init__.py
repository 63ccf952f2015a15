"""OPSD + PHF in plain PyTorch and transformers: what the product must equal.

One process, one sequence at a time, no padding, autograd for every gradient, hidden states by hooks
on HuggingFace's own layers.  Shares no code with the rest of the package and imports nothing of it;
only what compares the two (``cli``, tests) imports it.
"""

from megatron_phf.reference.flags import flags
from megatron_phf.reference.hidden import cka_terms, flow_terms, named_terms, window
from megatron_phf.reference.method import Result, compute, read_replay, train
from megatron_phf.reference.model import load_model
from megatron_phf.reference.options import Options
from megatron_phf.reference.output_loss import divergence
from megatron_phf.reference.weights import token_weights, weighted_terms

__all__ = [
    "Options",
    "Result",
    "cka_terms",
    "compute",
    "divergence",
    "flags",
    "flow_terms",
    "load_model",
    "named_terms",
    "read_replay",
    "token_weights",
    "train",
    "weighted_terms",
    "window",
]
