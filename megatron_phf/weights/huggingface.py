"""HuggingFace weights into the Megatron model and back, through ``mbridge``.

mbridge maps names and merges q/k/v and gate/up.  Added here: the names of the ``local`` layer
spec, zero attention heads where the tensor-parallel size does not divide the model's, and an
export that is complete or not there at all.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.files.directories import write_directory
from megatron_phf.lora.files import export_adapter, merge_adapter
from megatron_phf.lora.linears import is_adapter
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.fp8 import unrounded
from megatron_phf.model.gpt import FlowGPTModel, wait_for_weights
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.runtime import parallel
from megatron_phf.runtime.private_names import BridgeHooks, bridge_class
from megatron_phf.runtime.together import on_every_rank
from megatron_phf.weights import loaded
from megatron_phf.weights.headers import StoredTensor, stored_tensors
from megatron_phf.weights.hf_directory import SHARD_BYTES, copy_model_files, write_shards

_LAYER = "model.layers.{layer_number}."


class _StoredWeights:
    """What mbridge reads weights through: the tensors that were checked, from their files."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def load_one_hf_weight(self, name: str) -> Tensor:
        """The whole tensor."""
        with safe_open(self._stored[name].file, "pt") as f:
            return f.get_tensor(name)


class _Bridge(BridgeHooks):
    """Mixed into mbridge's class of an architecture (``_bridge``)."""

    arch: Architecture
    stored: Mapping[str, StoredTensor]

    def weight_reader(self) -> _StoredWeights:
        return _StoredWeights(self.stored)

    def build_config(self) -> Any:
        # mbridge would build a TransformerConfig of its own choices; it reads just these.
        experts = self.arch.experts
        count = None if experts is None else experts.count
        return SimpleNamespace(gated_linear_unit=True, num_moe_experts=count)

    def direct_mapping(self, mapping: dict[str, str]) -> dict[str, str]:
        tied = {"output_layer.weight": "model.embed_tokens.weight"}
        return {**mapping, **tied} if self.arch.tie_word_embeddings else mapping

    def to_megatron(self, name: str, weights: list[Tensor], convert: Callable[..., Any]) -> Tensor:
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            weights = [_fit_vocabulary(weight, self.arch) for weight in weights]
        weight = convert(name, weights)
        return _pad_heads(name, weight, self._extra_groups(), self.arch)

    def to_hf(self, name: str, weight: Tensor, convert: Callable[..., Any]) -> Any:
        return convert(name, _drop_heads(name, weight, self._extra_groups(), self.arch))

    def _extra_groups(self) -> int:
        padded = self.arch.padded_groups(parallel.tensor_parallel_size())
        return padded - self.arch.num_query_groups


def _fit_vocabulary(weight: Tensor, arch: Architecture) -> Tensor:
    """Rows as in ``arch.vocab_size``: those beyond are padding, and so are the ones added."""
    if arch.stored_vocab_size is None:
        return weight
    if weight.shape[0] != arch.stored_vocab_size:
        raise ValueError(f"{weight.shape[0]} vocabulary rows, not {arch.stored_vocab_size}")
    missing = max(arch.vocab_size - arch.stored_vocab_size, 0)
    return torch.cat((weight[: arch.vocab_size], weight.new_zeros(missing, weight.shape[1])))


def _head_rows(name: str, extra_groups: int, arch: Architecture) -> tuple[int, int]:
    """(dimension of the heads, rows that padding adds) of a weight; (0, 0) without heads."""
    per_group = arch.num_attention_heads // arch.num_query_groups
    if "self_attention.linear_qkv." in name and "layer_norm" not in name:
        return 0, extra_groups * (per_group + 2) * arch.kv_channels
    if "self_attention.linear_proj.weight" in name:
        return 1, extra_groups * per_group * arch.kv_channels
    return 0, 0


def _pad_heads(name: str, weight: Tensor, extra_groups: int, arch: Architecture) -> Tensor:
    """Append key/value groups of zeros.

    Exact, in training too: a zero head's value is zero and nothing reads it, so its output, and
    the gradient of each of its weights, stays zero.
    """
    dim, rows = _head_rows(name, extra_groups, arch)
    if rows == 0:
        return weight
    shape = list(weight.shape)
    shape[dim] = rows
    return torch.cat((weight, weight.new_zeros(shape)), dim=dim)


def _drop_heads(name: str, weight: Tensor, extra_groups: int, arch: Architecture) -> Tensor:
    dim, rows = _head_rows(name, extra_groups, arch)
    return weight.narrow(dim, 0, weight.shape[dim] - rows) if rows else weight


class _AsMbridgeNames:
    """A model chunk as mbridge knows it: no adapters, experts named as in TE's layer spec.

    The ``local`` spec has experts.local_experts.N.linear_fc1.weight, the other one
    experts.linear_fc1.weightN.
    """

    _LOCAL = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")

    def __init__(self, chunk: FlowGPTModel) -> None:
        self._chunk = chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chunk, name)

    def _named(self, pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, value in pairs:
            if not is_adapter(name):
                yield self._LOCAL.sub(r"experts.\2.weight\1", name), value

    def state_dict(self) -> dict[str, Any]:
        """The base model's."""
        return dict(self._named(self._chunk.state_dict().items()))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The base model's."""
        return self._named(self._chunk.named_parameters())


def _bridge(arch: Architecture, config: Config) -> Any:
    norms = {
        "input_layernorm.weight": [_LAYER + "input_layernorm.weight"],
        "pre_mlp_layernorm.weight": [_LAYER + "post_attention_layernorm.weight"],
    }
    hf_config = SimpleNamespace(
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        hidden_size=arch.hidden_size,
        head_dim=arch.kv_channels,
        tie_word_embeddings=arch.tie_word_embeddings,
    )
    tp = parallel.tensor_parallel_size()
    divisible_by = config.model.make_vocab_size_divisible_by
    bridge = bridge_class(_Bridge, arch.family.bridge, norms, arch=arch)(
        hf_config, dtype=model_dtype(config), make_vocab_size_divisible_by=divisible_by * tp
    )
    bridge.vocab_size = arch.vocab_size
    bridge.padded_vocab_size = arch.padded_vocab_size(divisible_by, tp)
    return bridge


@torch.no_grad()
def load_hf_weights(
    chunks: list[FlowGPTModel],
    arch: Architecture,
    config: Config,
    directory: str,
    flag: str = "--hf-model",
) -> None:
    """Fill ``chunks`` with the safetensors of ``directory``, which ``flag`` named; collective.

    Raises:
        ValueError: weights are missing or damaged, or their index leads out of ``directory``.
    """
    base = [_AsMbridgeNames(chunk) for chunk in chunks]
    stored = stored_tensors(directory)
    try:
        bridge = _bridge(arch, config)
        bridge.stored = stored
        with unrounded(chunks):
            bridge.load_weights(base, directory, memory_efficient=True)
    except (KeyError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{flag} {directory}: its weights do not load ({error}); copy the model again"
        ) from error
    if not chunks[0].config.fp8_param:
        on_every_rank(_check_loaded, base, arch, stored, f"{flag} {directory}")


def _check_loaded(
    base: list[_AsMbridgeNames], arch: Architecture, stored: Mapping[str, StoredTensor], named: str
) -> None:
    for chunk in base:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        try:
            problem = loaded.difference(chunk.named_parameters(), arch, layers, stored)
        except (KeyError, OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{named}: its weights do not load ({error}); copy the model again"
            ) from error
        if problem is not None:
            raise ValueError(
                f"{named}: after loading, {problem}; were the files changed meanwhile? Else it is "
                "a fault of megatron_phf: please report it"
            )


def export_hf_weights(
    chunks: list[FlowGPTModel],
    arch: Architecture,
    config: Config,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(HuggingFace name, whole tensor) on every rank, one at a time; collective.

    Adapters are merged into the weights they belong to.  ``dtype``: None keeps the model's.
    """
    wait_for_weights(chunks)
    seen: set[str] = set()
    weights = _bridge(arch, config).export_weights([_AsMbridgeNames(chunk) for chunk in chunks])
    if config.lora.lora_rank:
        scale = config.lora.lora_alpha / config.lora.lora_rank
        weights = merge_adapter(weights, dict(export_adapter(chunks)), scale, dtype)
    for name, weight in weights:
        # A tied embedding sits on the first and on the last stage.
        if name not in seen:
            seen.add(name)
            yield name, weight.detach().to(dtype or weight.dtype)


def _with_tied_head(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The embedding a second time, as the output head that is tied to it."""
    for name, weight in weights:
        yield name, weight
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", weight.clone()  # safetensors refuses shared memory


def export_with_head(
    chunks: list[FlowGPTModel],
    arch: Architecture,
    config: Config,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As :func:`export_hf_weights`, with the output head also where it is the embedding."""
    weights = export_hf_weights(chunks, arch, config, dtype)
    return _with_tied_head(weights) if arch.tie_word_embeddings else weights


def save_hf(
    chunks: list[FlowGPTModel],
    arch: Architecture,
    config: Config,
    source: str,
    target: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    flag: str = "--save-hf",
    tied_head: bool = False,
) -> None:
    """Export to ``target``, with the configuration and tokenizer of ``source``; every rank calls.

    Written beside and renamed at the end: ``target`` is whole, or as it was.  Beside its part of
    the model a rank holds a few copies of one tensor, and rank 0 one file of ``max_shard_bytes``.

    Args:
        dtype: of the files; None keeps the model's.
        flag: the one that named ``target``.
        tied_head: write a tied output head too, not the embedding alone.

    Raises:
        ValueError: ``target`` cannot be written (disk full, no permission), on every rank.
    """
    dtype = dtype or next(chunks[0].parameters()).dtype
    export = export_with_head if tied_head else export_hf_weights
    weights = export(chunks, arch, config, dtype)

    def write(directory: str) -> None:
        write_shards(weights, directory, max_shard_bytes)
        copy_model_files(source, directory, dtype, config.tokenizer)

    # The export is collective: for the other ranks, and for rank 0 after an error.
    write_directory(target, flag, write, meanwhile=lambda: deque(weights, maxlen=0))
