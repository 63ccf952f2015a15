"""Log-probabilities of given tokens, and entropies, output head included, in chunks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.losses._vocab_parallel import vocab_shard


@torch.no_grad()
def chunked_log_probs(
    rows: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk_tokens: int = 256,
) -> Tensor:
    """rows [n, h], weight [v_local, h], target_ids [n] -> log softmax(rows W^T)[target], fp32 [n].

    At temperature 1, without gradient.  The other arguments are ``chunked_divergence``'s.
    """
    shard = vocab_shard(group, vocab_start, weight.shape[0], vocab_size)
    size = shard.size
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = [rows.new_zeros(0, dtype=wide)]
    for chunk, ids in zip(rows.split(chunk_tokens), target_ids.split(chunk_tokens), strict=True):
        if not len(chunk):
            continue
        logs = shard.log_softmax_((chunk @ weight[:size].T).to(wide))
        parts.append(shard.sum(shard.pick(logs, ids)))
    return torch.cat(parts)


@torch.no_grad()
def chunked_entropy(
    rows: Tensor,
    weight: Tensor,
    temperature: float,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk_tokens: int = 256,
) -> Tensor:
    """rows [n, h], weight [v_local, h] -> entropy of softmax(rows W^T / temperature), fp32 [n].

    Nats, over the full vocabulary, without gradient.  The other arguments are
    ``chunked_divergence``'s.
    """
    shard = vocab_shard(group, vocab_start, weight.shape[0], vocab_size)
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = [rows.new_zeros(0, dtype=wide)]
    for chunk in rows.split(chunk_tokens):
        if len(chunk):
            logits = (chunk @ weight[: shard.size].T).to(wide).div_(temperature)
            logs = shard.log_softmax_(logits)
            parts.append(shard.sum(-(logs.exp() * logs).sum(-1)))
    return torch.cat(parts)
