"""Self-attention for rollouts (KV cache) and a core attention without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_phf import parallel
from megatron_phf.model.rows import context_positions


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """query [b, np, sq, hn], key and value [b, ng, sk, hn], mask bool [b, 1, sq, sk] (True: see).

    Returns [sq, b, np * hn], the layout of megatron's output projection.
    """
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.permute(2, 0, 1, 3).reshape(query.shape[2], query.shape[0], -1)


class CausalAttention(MegatronModule):
    """torch's fused attention as megatron's core attention, for the ``local`` layer spec.

    megatron-core's own ``DotProductAttention`` materialises [b, heads, s, s] scores.  Sequences
    are padded on the right, so that causality alone hides the padding.  Under context parallelism
    every rank gathers the keys and values of the whole sequence for its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.context = parallel.context_parallel_group()
        assert config.attention_dropout == 0 and not attention_dropout, "rollouts have no dropout"
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, np, hn], key and value [s, b, ng, hn] -> [s, b, np * hn]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        size, mask = self.context.size(), None
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.context) for x in (key, value)
            )
            parts = [context_positions(len(key), size, r).to(query.device) for r in range(size)]
            mask = (parts[self.context.rank()][:, None] >= torch.cat(parts))[None, None]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend(q, k, v, mask, is_causal=mask is None, scale=self.scale)


class KVCache:
    """Keys and values of one batch of rollouts on one pipeline stage.

    Rows are aligned at their ends (prompts padded on the left), so that every row writes the same
    column.  ``seen`` [b, capacity] says which columns hold a row's own tokens.  Positions are each
    row's own, hence the cache does not depend on the padding.
    """

    def __init__(self, capacity: int, seen: Tensor) -> None:
        self.capacity = capacity
        self.length = 0
        self.seen = torch.zeros(seen.shape[0], capacity, dtype=torch.bool, device=seen.device)
        self.seen[:, : seen.shape[1]] = seen
        self.cos_sin: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        """Prepare a forward pass of tokens at ``positions`` [b, s], the next s columns."""
        s, end = positions.shape[1], self.length + positions.shape[1]
        angles = positions.T[..., None].float() * inv_freq.to(positions.device)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)  # [s, b, 1, hn]
        self.cos_sin = (angles.cos().to(dtype), angles.sin().to(dtype))
        causal = torch.ones(s, end, dtype=torch.bool, device=positions.device)
        causal = causal.tril(diagonal=end - s)
        own = torch.eye(s, dtype=torch.bool, device=positions.device)
        # A padded query sees itself: a row without any key would turn into NaN and spread.
        own = F.pad(own, (end - s, 0))
        self.mask = ((self.seen[:, None, :end] & causal) | own).unsqueeze(1)

    def finish(self) -> None:
        """The columns written since :meth:`begin` count from now on."""
        assert self.mask is not None
        self.length += self.mask.shape[2]
        self.mask = self.cos_sin = None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key and value [s, b, ng, hn] -> all so far, each [b, ng, length, hn]."""
        s, b, groups, width = key.shape
        if layer not in self._layers:
            shape = (b, groups, self.capacity, width)
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        columns = slice(self.length, self.length + s)
        both = self._layers[layer]
        for store, new in zip(both, (key, value), strict=True):
            store[:, :, columns] = new.permute(1, 2, 0, 3)
        return both[0][:, :, : columns.stop], both[1][:, :, : columns.stop]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but ``rows`` (indices): finished rollouts leave the batch."""
        self.seen = self.seen[rows]
        self._layers = {n: (k[rows], v[rows]) for n, (k, v) in self._layers.items()}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [s, b, heads, hn], non-interleaved halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class CachedSelfAttention(SelfAttention):
    """megatron's self-attention, which also continues rollouts from a :class:`KVCache`.

    megatron-core's own static cache keeps keys before rotation and rotates all of them again at
    every token; its engines also know no rows of different lengths without recomputation.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        inference_context: KVCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> (output [s, b, h], bias)."""
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        cache = inference_context
        assert cache.cos_sin is not None, "KVCache.begin comes first"
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        query, key = (_rotate(x, *cache.cos_sin) for x in (query, key))
        keys, values = cache.append(self.layer_number, key, value)
        scale = self.config.softmax_scale or self.config.kv_channels**-0.5
        out = attend(query.permute(1, 2, 0, 3), keys, values, cache.mask, False, scale)
        return self.linear_proj(out)
