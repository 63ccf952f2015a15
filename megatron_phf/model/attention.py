"""A core attention without Transformer Engine, and the kernels that rollouts share with it.

Which of torch's kernels they may be says ``device.setup``: on CUDA none of cuDNN's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_phf.hidden.rows import context_positions
from megatron_phf.runtime import device, parallel


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """query [b, np, sq, hn], key and value [b, ng, sk, hn], mask bool [b, 1, sq, sk] (True: see).

    Returns [sq, b, np * hn], the layout of megatron's output projection.
    """
    heads = query.shape[1] // key.shape[1]
    if heads > 1 and _expands_groups(query, mask):
        key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
        heads = 1
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=heads > 1,
    )
    return out.permute(2, 0, 1, 3).reshape(query.shape[2], query.shape[0], -1)


def attend_token(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """One new token a row: query [b, ng, heads, hn], key and value [b, ng, sk, hn], bias on scores.

    Returns [b, ng, heads, hn].  The heads of a group are the queries of one head, which all see the
    same: no group is left, so every fused kernel takes it, several times faster than enable_gqa.
    """
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale)


def _expands_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether only attention without groups is fused.

    On CUDA (sdp_utils.cpp of torch 2.11 to 2.13) flash attention has groups, but neither a mask nor
    fp32; memory-efficient attention has those, but no groups.  Without either, torch writes all
    scores out.  On CPUs flash attention has everything.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return device.has_cuda() and (mask is not None or not half)


@functools.lru_cache(maxsize=1)
def _visible(
    lengths: tuple[int, ...], size: int, rank: int, where: torch.device
) -> tuple[Tensor, ...]:
    """Which keys of each sequence, rank by rank, context rank ``rank`` of ``size`` sees.

    ``lengths``: of its queries.  Bool [1, 1, length, size x length] each; all layers of a
    microbatch, and their backward passes, share them.
    """
    masks = []
    for length in lengths:
        parts = [context_positions(size * length, size, r) for r in range(size)]
        own, every = (device.from_host(x).to(where) for x in (parts[rank], torch.cat(parts)))
        masks.append((own[:, None] >= every)[None, None])
    return tuple(masks)


class CausalAttention(MegatronModule):
    """torch's fused attention as megatron's core attention, for the ``local`` layer spec.

    megatron-core's own ``DotProductAttention`` materialises [b, heads, s, s] scores.  Sequences
    are padded on the right, so that causality alone hides the padding.  The sequences of a packed
    row attend one after the other.  Under context parallelism every rank gathers the keys and
    values of the whole row for its own queries.
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
        """query [s, b, np, hn], key and value [s, b, ng, hn] -> [s, b, np * hn].

        Packed: without b, and [s, 1, np * hn].
        """
        assert attention_mask is None and attention_bias is None
        size = self.context.size()
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.context) for x in (key, value)
            )
        if packed_seq_params is None:
            return self._attend(query, key, value, *self._masks([len(query)], query.device))
        # This rank's tokens of each sequence; every rank's of keys and values, by rank.
        lengths = (packed_seq_params.cu_seqlens_q.diff() // size).tolist()  # it is on the host
        queries = query.unsqueeze(1).split(lengths)
        keys, values = (
            x.unsqueeze(1).unflatten(0, (size, -1)).split(lengths, dim=1) for x in (key, value)
        )
        sides = zip(queries, keys, values, self._masks(lengths, query.device), strict=True)
        return torch.cat(
            [self._attend(q, k.flatten(0, 1), v.flatten(0, 1), mask) for q, k, v, mask in sides]
        )

    def _masks(self, lengths: Sequence[int], where: torch.device) -> Sequence[Tensor | None]:
        """Of each sequence; None where causality is all, which needs no mask."""
        if self.context.size() == 1:
            return [None] * len(lengths)
        return _visible(tuple(lengths), self.context.size(), self.context.rank(), where)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One sequence: this context rank's queries, the keys and values of all, rank by rank."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend(q, k, v, mask, is_causal=mask is None, scale=self.scale)
