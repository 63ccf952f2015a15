"""Weights as megatron-core's distributed checkpoint: saved in one layout, loaded in any other.

Keys are megatron-core's own (``decoder.layers.self_attention.linear_qkv.weight`` holds all
layers).  What padding adds depends on the layout: vocabulary rows on
``--make-vocab-size-divisible-by`` times the tensor-parallel size, zero heads on that size.  Both
are zeros at the end of their dimension, so a tensor may have another length there when it is
loaded: missing rows become zeros again, superfluous ones are left out.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_phf.model.fp8 import unrounded, without_fp8_state
from megatron_phf.model.gpt import FlowGPTModel, wait_for_weights
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.weights import torch_dist

_WITH_HEADS = ("self_attention.linear_qkv.", "self_attention.linear_proj.")


def weights_sharded_state_dict(chunks: list[FlowGPTModel], prefix: str = "") -> dict[str, Any]:
    """This rank's share of the weights: {"model0": {name: sharded tensor}, ...}, one a chunk.

    ``prefix`` goes before every key of the checkpoint.
    """
    wait_for_weights(chunks)
    state = {}
    for number, chunk in enumerate(chunks):
        tensors = without_fp8_state(chunk.sharded_state_dict(prefix=prefix))
        for value in tensors.values():
            if isinstance(value, ShardedTensor) and any(n in value.key for n in _WITH_HEADS):
                value.allow_shape_mismatch = True
        state[f"model{number}"] = tensors
    return state


def load_weights_state(chunks: list[FlowGPTModel], state: dict[str, Any], prefix: str = "") -> None:
    """Put tensors that ``torch_dist.read`` gave for ``weights_sharded_state_dict`` in place."""
    for number, chunk in enumerate(chunks):
        tensors = state[f"model{number}"].items()
        chunk.load_state_dict({k.removeprefix(prefix): v for k, v in tensors}, strict=False)


def save_weights(chunks: list[FlowGPTModel], directory: str) -> None:
    """Write the weights into the new ``directory``; every rank calls it.

    Raises:
        ValueError: it cannot be written, on every rank.
    """
    try:
        on_first_rank(lambda: os.makedirs(directory, exist_ok=True))
        torch_dist.Snapshot(weights_sharded_state_dict(chunks)).write(directory)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error})") from error


def load_weights(chunks: list[FlowGPTModel], directory: str) -> None:
    """Fill ``chunks`` from weights, or from the weights of a training checkpoint; collective.

    Raises:
        ValueError: damaged, or another model's.
    """
    with unrounded(chunks):
        _load_weights(chunks, directory)


def _load_weights(chunks: list[FlowGPTModel], directory: str) -> None:
    state = weights_sharded_state_dict(chunks)
    # Left to megatron-core, the halves of each gated MLP would be joined in a second copy of it.
    apply_factories(state)
    state = torch_dist.read(state, directory, complete=False)
    for number, chunk in enumerate(chunks):
        tensors = state[f"model{number}"]
        for name, parameter in chunk.named_parameters():
            if isinstance(parts := tensors.get(name), list):
                _fill(parameter, parts)
                del tensors[name]
    load_weights_state(chunks, state)


@torch.no_grad()
def _fill(parameter: Tensor, parts: list[Tensor]) -> None:
    for target, part in zip(parameter.chunk(len(parts)), parts, strict=True):
        if target.data_ptr() != part.data_ptr():  # mostly it was read in place
            target.copy_(part)
