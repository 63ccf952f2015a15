"""A transformer layer of the student for rollouts: keys and values kept, no autograd, few calls.

megatron-core's own forward of a layer costs more Python than arithmetic where a batch has one token
a row: autograd functions for tensor-parallel regions, dispatch for features that are off.  This is
the same arithmetic on the same weights, adapters included.  Linears and experts of another kind
(Transformer Engine, mixtures) run their own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_phf.lora.linears import AdaptedLinear
from megatron_phf.model.attention import attend, attend_token
from megatron_phf.model.layer import FlowTransformerLayer
from megatron_phf.runtime import parallel


class KVCache:
    """Keys and values of one batch of rollouts on one pipeline stage.

    Rows are aligned at their ends (prompts padded on the left), so that every row writes the same
    column.  Positions are each row's own, hence the cache does not depend on the padding.
    """

    def __init__(self, capacity: int, seen: Tensor) -> None:
        """``seen`` bool [b, prompt]: which columns hold a row's own tokens; later ones all do."""
        self.capacity = capacity
        self.length = 0
        padded = not bool(seen.all())  # rows of one length need no mask
        self._seen = F.pad(seen, (0, capacity - seen.shape[1]), value=True) if padded else None
        self._table: Tensor | None = None
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None
        self._bias: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        """Prepare a forward pass of tokens at ``positions`` [b, s], the next s columns."""
        if self._table is None:
            self._table = _rotation_table(self.capacity, inv_freq.to(positions.device), dtype)
        cos, sin = self._table[:, positions.T, None, None]  # each [s, b, 1, 1, hn]
        self.rotation = (cos, sin)
        self.mask = self._mask(positions.shape[1], dtype)

    def _mask(self, s: int, dtype: torch.dtype) -> Tensor | None:
        """What s new tokens see: bool [b, 1, s, length + s], or for one token its bias on scores.

        None: everything up to the token itself.
        """
        if self._seen is None:
            return None
        end = self.length + s
        if s == 1:
            if self._bias is None:  # the same for every token: made once
                hidden = torch.zeros(self._seen.shape, dtype=dtype, device=self._seen.device)
                self._bias = hidden.masked_fill_(~self._seen, torch.finfo(dtype).min)
            return self._bias[:, None, None, :end]
        causal = self._seen.new_ones(s, end).tril(diagonal=end - s)
        # A padded query sees itself: a row without any key would turn into NaN and spread.
        own = self._seen.new_ones(s, end).tril(end - s).triu(end - s)
        return ((self._seen[:, None, :end] & causal) | own).unsqueeze(1)

    def finish(self, s: int) -> None:
        """The ``s`` columns written since :meth:`begin` count from now on."""
        self.length += s
        self.mask = self.rotation = None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key and value [s, b, ng, hn] -> all so far, each [b, ng, length, hn]."""
        s, b, groups, width = key.shape
        if layer not in self._layers:
            shape = (b, groups, self.capacity, width)
            self._layers[layer] = (key.new_empty(shape), value.new_empty(shape))
        columns = slice(self.length, self.length + s)
        both = self._layers[layer]
        for store, new in zip(both, (key, value), strict=True):
            store[:, :, columns] = new.permute(1, 2, 0, 3)
        return both[0][:, :, : columns.stop], both[1][:, :, : columns.stop]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but ``rows`` (indices): finished rollouts leave the batch."""
        if self._seen is not None:
            self._seen, self._bias = self._seen[rows], None
        self._layers = {n: (self._kept(k, rows), self._kept(v, rows)) for n, (k, v) in
                        self._layers.items()}  # fmt: skip

    def _kept(self, store: Tensor, rows: Tensor) -> Tensor:
        smaller = store.new_empty((len(rows), *store.shape[1:]))
        smaller[:, :, : self.length] = store[rows, :, : self.length]
        return smaller


def _rotation_table(length: int, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """cos, and sin with the sign of its half, of every position: [2, length, hn]."""
    angles = torch.arange(length, device=inv_freq.device)[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [s, b, ng, heads, hn], non-interleaved halves."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def _project(linear: Any, x: Tensor) -> Tensor:
    """x [s, b, in] through a tensor-parallel linear of megatron, with its adapters if any."""
    adapted = isinstance(linear, AdaptedLinear)
    kind = linear.linear_class if adapted else type(linear)
    if kind not in (ColumnParallelLinear, RowParallelLinear):
        return linear(x)[0]
    row = kind is RowParallelLinear
    bias = None if row or linear.skip_bias_add else linear.bias
    if bias is not linear.bias:
        return linear(x)[0]
    out = F.linear(x, linear.weight, bias)
    if row and parallel.tensor_parallel_size() > 1:
        dist.all_reduce(out, group=parallel.tensor_parallel_group())
    if adapted:
        linear.add_adapters_(x, out)
    return out


def _attention(attention: Any, x: Tensor, layer: int, cache: KVCache) -> Tensor:
    """Normalised x [s, b, h] -> the attention's output [s, b, h]."""
    assert cache.rotation is not None, "KVCache.begin comes first"
    s, b, _ = x.shape
    groups, width = (
        attention.num_query_groups_per_partition,
        attention.hidden_size_per_attention_head,
    )
    qkv = _project(attention.linear_qkv, x).view(s, b, groups, -1, width)
    query, key, value = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1, :]
    if attention.q_layernorm is not None:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    query, key = _rotate(query, *cache.rotation), _rotate(key, *cache.rotation)
    keys, values = cache.append(layer, key.squeeze(-2), value)
    scale = attention.config.softmax_scale or attention.config.kv_channels**-0.5
    if s == 1:
        out = attend_token(query[0], keys, values, cache.mask, scale).reshape(1, b, -1)
    else:
        query = query.flatten(2, 3).permute(1, 2, 0, 3)
        out = attend(query, keys, values, cache.mask, cache.mask is None, scale)
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
    x = layer.input_layernorm(hidden)
    hidden = hidden + _attention(layer.self_attention, x, layer.layer_number, cache)
    return hidden + _feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden))
