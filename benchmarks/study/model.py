"""M Qwen3 models of one shape, one batched forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_EPS = 1e-6
_STD = 0.02


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Weights by their HuggingFace names, in a row's order: those of one product together."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        shapes |= {
            f"{attention}q_proj.weight": (heads * head, hidden),
            f"{attention}k_proj.weight": (groups * head, hidden),
            f"{attention}v_proj.weight": (groups * head, hidden),
            f"{attention}o_proj.weight": (hidden, heads * head),
            f"{attention}q_norm.weight": (head,),
            f"{attention}k_norm.weight": (head,),
            f"{mlp}gate_proj.weight": (config["intermediate_size"], hidden),
            f"{mlp}up_proj.weight": (config["intermediate_size"], hidden),
            f"{mlp}down_proj.weight": (hidden, config["intermediate_size"]),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,)}


_FUSED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


class Stack:
    """``flat`` [M, P]: each row a model's weights; the tensors that are read are views of it.

    With ``trainable`` they are leaves of autograd's graph.
    """

    def __init__(self, config: Mapping[str, Any], flat: Tensor, trainable: bool = False) -> None:
        self.config, self.flat = config, flat
        self.weights = self._views(flat)
        for weight in self.weights.values():
            weight.requires_grad_(trainable)
        frequencies = config["rope_parameters"]["rope_theta"] ** (
            -torch.arange(0, config["head_dim"], 2).float() / config["head_dim"]
        )
        angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), frequencies)
        self.cos, self.sin = (torch.cat([x, x], -1) for x in (angles.cos(), angles.sin()))

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values are one weight, gate and up another, under the first name."""
        views, start = {}, 0
        shapes = _shapes(self.config)
        for name, shape in shapes.items():
            kind = name.split(".")[-2]
            size = math.prod(shape)
            if any(kind in parts[1:] for parts in _FUSED.values()):
                continue
            for part in _FUSED.get(kind, ())[1:]:
                size += math.prod(shapes[name.replace(kind, part)])
            rows = size // math.prod(shape[1:])
            view = flat[:, start : start + size].detach()
            views[name] = view.unflatten(1, (rows, *shape[1:]))
            start += size
        assert start == flat.shape[1]
        return views

    def gradient(self, loss: Tensor) -> Tensor:
        """Of ``loss`` in ``flat``, [M, P]."""
        parts = torch.autograd.grad(loss, list(self.weights.values()))
        return torch.cat([part.flatten(1) for part in parts], 1)

    def __len__(self) -> int:
        return len(self.flat)


def initial(config: Mapping[str, Any], seeds: list[int]) -> Tensor:
    """Random weights [M, P], one model a seed."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.randn(math.prod(shape), generator=generator) * _STD
            if len(shape) > 1
            else torch.ones(math.prod(shape))
            for shape in _shapes(config).values()
        ]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def from_hf(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """A HuggingFace model's tensors -> its row [P]."""
    return torch.cat([tensors[name].float().flatten() for name in _shapes(config)])


def to_hf(config: Mapping[str, Any], row: Tensor) -> dict[str, Tensor]:
    """A row [P] -> the tensors of a HuggingFace model."""
    shapes = _shapes(config)
    parts = row.split([math.prod(shape) for shape in shapes.values()])
    return {n: p.view(s).clone() for (n, s), p in zip(shapes.items(), parts, strict=True)}


Cache = list[tuple[Tensor, Tensor]]


def new_cache(models: Stack, rows: int, length: int) -> Cache:
    """Keys and values of each layer, ``rows`` sequences a model of ``length`` tokens at most."""
    c = models.config
    shape = (len(models) * rows, c["num_key_value_heads"], length, c["head_dim"])
    size = c["num_hidden_layers"]
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(size)]


def forward(
    models: Stack, ids: Tensor, cache: Cache | None = None, start: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """ids [M, b, t] -> (what the output head reads, each layer's output), [M, b, t, h] each.

    With a ``cache`` the tokens stand at ``start`` and see what it holds before.
    """
    m, b, t = ids.shape
    weights = models.weights
    index = torch.arange(m)[:, None], ids.reshape(m, b * t)
    x = weights["model.embed_tokens.weight"][index]
    states = []
    for i in range(models.config["num_hidden_layers"]):
        x = _layer(models, i, x, (m, b, t), cache[i] if cache else None, start)
        states.append(x.view(m, b, t, -1))
    return _norm(x, weights["model.norm.weight"]).view(m, b, t, -1), states


def logits(models: Stack, states: Tensor) -> Tensor:
    """[M, n, h] behind the last norm -> [M, n, v]; the head is the embedding."""
    return torch.bmm(states, models.weights["model.embed_tokens.weight"].mT)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension; x [M, ..., h], a weight [M, h] for each model."""
    shape = (len(weight), *[1] * (x.dim() - 2), weight.shape[1])
    return F.rms_norm(x, weight.shape[1:], eps=_EPS) * weight.view(shape)


def _layer(
    models: Stack,
    i: int,
    x: Tensor,
    shape: tuple[int, int, int],
    cache: tuple[Tensor, Tensor] | None,
    start: int,
) -> Tensor:
    """x [M, b t, h] -> the same behind layer ``i``."""
    name = f"model.layers.{i}."
    w = {k: models.weights[name + k + ".weight"] for k in _LAYER}
    y = torch.bmm(_norm(x, w["input_layernorm"]), w["self_attn.q_proj"].mT)
    y = _attention(models, y, (w["self_attn.q_norm"], w["self_attn.k_norm"]), shape, cache, start)
    x = x + torch.bmm(y, w["self_attn.o_proj"].mT)
    y = torch.bmm(_norm(x, w["post_attention_layernorm"]), w["mlp.gate_proj"].mT)
    gate, up = y.chunk(2, -1)
    return x + torch.bmm(F.silu(gate) * up, w["mlp.down_proj"].mT)


_LAYER = (
    "self_attn.q_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
    "mlp.gate_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip


def _attention(
    models: Stack,
    mixed: Tensor,
    norms: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    cache: tuple[Tensor, Tensor] | None,
    start: int,
) -> Tensor:
    """mixed [M, b t, (heads + 2 groups) d] -> [M, b t, heads d]."""
    c, (m, b, t) = models.config, shape
    heads, groups, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q, k, v = mixed.view(m, b * t, -1, d).split([heads, groups, groups], 2)
    q, k = (_norm(x, n) for x, n in zip((q, k), norms, strict=True))
    q, k, v = (x.reshape(m * b, t, -1, d).transpose(1, 2) for x in (q, k, v))
    cos, sin = models.cos[start : start + t], models.sin[start : start + t]
    q, k = (x * cos + _rotated(x) * sin for x in (q, k))
    if cache is not None:
        for held, new in zip(cache, (k, v), strict=True):
            held[:, :, start : start + t] = new
        k, v = (held[:, :, : start + t] for held in cache)
    assert t == 1 or start == 0
    if t == 1:
        scores = q.view(m * b, groups, heads // groups, d) @ k.mT / math.sqrt(d)
        return (scores.softmax(-1) @ v).view(m, b, heads * d)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(m, b * t, heads * d)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
