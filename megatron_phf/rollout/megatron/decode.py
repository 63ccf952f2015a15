"""A transformer layer of the student for rollouts: keys and values kept, no autograd, few calls.

megatron-core's own forward of a layer costs more Python than arithmetic where a batch has one token
a row: autograd functions for tensor-parallel regions, dispatch for features that are off.  This is
the same arithmetic on the same weights, adapters included: Transformer Engine's norms and linears
too are a norm and a product of their own weights.  Experts, and weights kept in FP8, run their own
forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import Parameter

from megatron_phf.lora.linears import AdaptedLinear
from megatron_phf.model.attention import attend, attend_token
from megatron_phf.model.layer import FlowTransformerLayer
from megatron_phf.rollout.megatron.cache import KVCache
from megatron_phf.runtime import parallel

# megatron-core's classes by name: those of Transformer Engine are only there where it is.
_COLUMN_PARALLEL = (
    "ColumnParallelLinear",
    "TEColumnParallelLinear",
    "TELayerNormColumnParallelLinear",
)
_ROW_PARALLEL = ("RowParallelLinear", "TERowParallelLinear")


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding of x [s, b, ng, heads, hn], non-interleaved halves, in place."""
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    x.mul_(cos).addcmul_(swapped, sin)


def normalise(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm by the weight of ``norm``, whoever's; x itself where the linear behind has it."""
    if isinstance(norm, IdentityOp):
        return x
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _project(linear: Any, x: Tensor) -> Tensor:
    """x [s, b, in] through a tensor-parallel linear of megatron, with its adapters if any."""
    adapted = isinstance(linear, AdaptedLinear)
    kind = (linear.linear_class if adapted else type(linear)).__name__
    row = kind in _ROW_PARALLEL
    bias = getattr(linear, "bias", None)
    if bias is not None and bias.numel() == 0:  # Transformer Engine's way to have none
        bias = None
    if not (row or kind in _COLUMN_PARALLEL) or (bias is not None and _adds_later(linear, row)):
        return linear(x)[0]
    if type(linear.weight) is not Parameter:  # in FP8
        return linear(x)[0]
    gamma = getattr(linear, "layer_norm_weight", None)
    if gamma is not None:
        x = F.rms_norm(x, gamma.shape, gamma, linear.eps)
    out = F.linear(x, linear.weight, bias)
    if row and parallel.tensor_parallel_size() > 1:
        dist.all_reduce(out, group=parallel.tensor_parallel_group())
    if adapted:
        linear.add_adapters_(x, out)
    return out


def _adds_later(linear: Any, row: bool) -> bool:
    """Whether a bias is not simply part of the product: behind a sum over ranks, or by others."""
    return row or getattr(linear, "skip_bias_add", getattr(linear, "te_return_bias", False))


def _attention(attention: Any, x: Tensor, layer: int, cache: KVCache) -> Tensor:
    """Normalised x [s, b, h] -> the attention's output [s, b, h]."""
    assert cache.rotation is not None, "KVCache.begin comes first"
    s, b, _ = x.shape
    groups, width = (
        attention.num_query_groups_per_partition,
        attention.hidden_size_per_attention_head,
    )
    qkv = _project(attention.linear_qkv, x).view(s, b, groups, -1, width)
    if not isinstance(attention.q_layernorm, IdentityOp | None):
        query, key, value = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1:, :]
        query = normalise(attention.q_layernorm, query)
        key = normalise(attention.k_layernorm, key)
        qkv = torch.cat((query, key, value), dim=-2)
    _rotate_(qkv[..., :-1, :], *cache.rotation)
    query, both = qkv[..., :-2, :], qkv[..., -2:, :]
    scale = attention.config.softmax_scale or attention.config.kv_channels**-0.5
    bias = cache.bias
    if bias is not None:
        keys, values = cache.append(layer, both)
        out = attend_token(query[0], keys, values, bias, scale).reshape(1, b, -1)
    else:
        cache.fill(layer, both)
        query = query.flatten(2, 3).permute(1, 2, 0, 3)
        key, value = both.permute(3, 1, 2, 0, 4)
        out = attend(query, key, value, cache.mask, cache.mask is None, scale)
    return _project(attention.linear_proj, out)


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """Normalised x [s, b, h] -> the MLP's or the experts' output [s, b, h]."""
    if type(mlp) is not MLP:
        return mlp(x)[0]
    gate, up = _project(mlp.linear_fc1, x).chunk(2, dim=-1)
    return _project(mlp.linear_fc2, F.silu(gate).mul_(up))


def decode_layer(layer: FlowTransformerLayer, hidden: Tensor, cache: KVCache) -> Tensor:
    """hidden [s, b, h], the tokens that ``cache`` has begun -> the layer's output [s, b, h].

    The gated SiLU layers of our architectures: no dropout, no bias but that of q, k and v.
    """
    x = normalise(layer.input_layernorm, hidden)
    hidden = hidden + _attention(layer.self_attention, x, layer.layer_number, cache)
    return hidden + _feed_forward(layer.mlp, normalise(layer.pre_mlp_layernorm, hidden))
