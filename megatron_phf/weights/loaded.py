"""Whether the weights in memory are those of the files: a comparison at start, without collectives.

Every parameter of a rank is cut into the pieces of HuggingFace tensors that it is made of, and a
few rows of each piece are read again and compared exactly.  Where a piece lies is computed here
from the layout, independently of what loaded it, so that a wrong file, a tensor left out, a
mistaken order (q, k, v; gate, up), another rank's part or another layer's is seen, in any layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_phf.model.architecture import Architecture
from megatron_phf.runtime import parallel
from megatron_phf.weights.headers import StoredTensor

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
_WHOLE = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}


@dataclass(frozen=True)
class Piece:
    """``local`` [rows, columns] or [rows] is a tensor of the file from ``row`` and ``column`` on.

    Rows and columns beyond the file's are padding.
    """

    name: str
    local: Tensor
    row: int = 0
    column: int = 0


def _attention(name: str, weight: Tensor, arch: Architecture, prefix: str) -> Iterator[Piece]:
    channels, rank = arch.kv_channels, parallel.tensor_parallel_rank()
    queries = arch.num_attention_heads // arch.num_query_groups
    if name == "self_attention.linear_proj.weight":
        yield Piece(f"{prefix}self_attn.o_proj.weight", weight, column=rank * weight.shape[1])
        return
    kind = name.rpartition(".")[2]  # weight or bias
    groups = weight.view(-1, queries + 2, channels, *weight.shape[1:])
    for i, group in enumerate(groups):  # each: its queries, its key, its value
        number = rank * len(groups) + i
        if number < arch.num_query_groups:
            query, key, value = group[:queries].flatten(0, 1), group[-2], group[-1]
            row = number * channels
            yield Piece(f"{prefix}self_attn.q_proj.{kind}", query, row * queries)
            yield Piece(f"{prefix}self_attn.k_proj.{kind}", key, row)
            yield Piece(f"{prefix}self_attn.v_proj.{kind}", value, row)


def _mlp(linear: str, weight: Tensor, prefix: str, rank: int) -> Iterator[Piece]:
    if linear == "linear_fc2":
        yield Piece(f"{prefix}down_proj.weight", weight, column=rank * weight.shape[1])
        return
    for name, half in zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True):
        yield Piece(f"{prefix}{name}.weight", half, rank * len(half))


def _layer(name: str, weight: Tensor, arch: Architecture, prefix: str) -> Iterator[Piece]:
    expert = _EXPERT.fullmatch(name)
    if name in _WHOLE:
        yield Piece(prefix + _WHOLE[name], weight)
    elif expert is not None:
        assert arch.experts is not None
        here = arch.experts.count // parallel.expert_parallel_size()
        number = parallel.expert_parallel_rank() * here + int(expert[2])
        rank = parallel.expert_tensor_parallel_rank()
        yield from _mlp(expert[1], weight, f"{prefix}mlp.experts.{number}.", rank)
    elif name.startswith("mlp."):
        linear, rank = name.split(".")[1], parallel.tensor_parallel_rank()
        yield from _mlp(linear, weight, prefix + "mlp.", rank)
    else:
        yield from _attention(name, weight, arch, prefix)


def pieces(name: str, weight: Tensor, arch: Architecture, layers: Sequence[int]) -> Iterator[Piece]:
    """The HuggingFace tensors' parts in one parameter of this rank.

    Args:
        name: mbridge's name of it in its chunk.
        layers: the numbers, from 0, of the chunk's layers in the whole model.
    """
    row = parallel.tensor_parallel_rank() * len(weight)
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        yield from _layer(layer[2], weight, arch, f"model.layers.{layers[int(layer[1])]}.")
    elif name == "decoder.final_layernorm.weight":
        yield Piece("model.norm.weight", weight)
    else:
        assert name in ("output_layer.weight", "embedding.word_embeddings.weight"), name
        own = name == "output_layer.weight" and not arch.tie_word_embeddings
        # Another teacher's file may have rows beyond the vocabulary, which are left out.
        known = weight[: max(0, arch.vocab_size - row)]
        yield Piece("lm_head.weight" if own else "model.embed_tokens.weight", known, row)


def _same(piece: Piece, stored: StoredTensor) -> bool:
    """Whether the first, the middle and the last row are the file's, rounded as they were."""
    rows = min(len(piece.local), stored.shape[0] - piece.row)
    with safe_open(stored.file, "pt") as f:
        tensor = f.get_slice(piece.name)
        if piece.local.dim() == 1:
            parts = [(piece.local[:rows], tensor[piece.row : piece.row + rows])]
        else:
            columns = min(piece.local.shape[1], stored.shape[1] - piece.column)
            if columns <= 0:
                return True
            end = piece.column + columns
            parts = [
                (
                    piece.local[i : i + 1, :columns],
                    tensor[piece.row + i : piece.row + i + 1, piece.column : end],
                )
                for i in sorted({0, rows // 2, rows - 1})
                if 0 <= i < rows
            ]
    return all(
        torch.allclose(local, read.to(local), rtol=0, atol=0, equal_nan=True)
        for local, read in parts
    )


@torch.no_grad()
def difference(
    parameters: Iterable[tuple[str, Tensor]],
    arch: Architecture,
    layers: Sequence[int],
    stored: Mapping[str, StoredTensor],
) -> str | None:
    """The first parameter of a chunk that is not what the files say; None where all are.

    Args:
        parameters: as mbridge names them.
        layers: see :func:`pieces`.
    """
    for name, weight in parameters:
        for piece in pieces(name, weight.detach(), arch, layers):
            tensor = stored[piece.name]
            if not _same(piece, tensor):
                return f"{name} is not {piece.name} of {tensor.file}"
    return None
