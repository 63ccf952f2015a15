"""HuggingFace weight files: what their headers say, checked against the disk and the model.

Headers and file sizes only, no import of torch: the checks before launch read them too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_phf.data.hf_files import INDEX_FILE, check_weight_index, parse_json, read_json_object
from megatron_phf.model.adapter_config import hf_shape
from megatron_phf.model.architecture import Architecture

_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class StoredTensor:
    """``file``: its path; ``dtype`` in safetensors' words (F32, BF16, F16)."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def _read_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file whose size is what its header says."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(min(length, size)).decode())
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + length + max((e["data_offsets"][1] for e in tensors.values()), default=0)
        found = {n: StoredTensor(path, e["dtype"], tuple(e["shape"])) for n, e in tensors.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file; copy it again") from error
    if size != expected:
        raise ValueError(
            f"{path}: {size} bytes, but its header describes {expected} (truncated?); copy it again"
        )
    return found


def stored_tensors(directory: str) -> dict[str, StoredTensor]:
    """The tensors of ``directory`` by name.

    Raises:
        ValueError: no safetensors, a file is missing, truncated or damaged, or the index names a
            tensor that its file does not hold.
    """
    check_weight_index(directory)
    path = os.path.join(directory, INDEX_FILE)
    index = read_json_object(path)["weight_map"] if os.path.isfile(path) else {}
    here = {name for name in os.listdir(directory) if name.endswith(".safetensors")}
    files = sorted(set(index.values()) or here)
    if not files:
        raise ValueError(f"{directory}: no *.safetensors in it; convert or copy the model again")
    found: dict[str, StoredTensor] = {}
    for name in files:
        found |= _read_header(os.path.join(directory, name))
    for tensor, name in index.items():
        if tensor not in found:
            raise ValueError(f"{directory}: {name} does not hold {tensor}; copy the model again")
    return found


def _layer_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    hidden, experts = arch.hidden_size, arch.experts
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": hf_shape("o_proj", arch),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes[f"self_attn.{name}.weight"] = hf_shape(name, arch)
        if arch.add_qkv_bias:
            shapes[f"self_attn.{name}.bias"] = hf_shape(name, arch)[:1]
    if arch.qk_layernorm:
        shapes |= {f"self_attn.{n}.weight": (arch.kv_channels,) for n in ("q_norm", "k_norm")}
    if experts is not None:
        shapes["mlp.gate.weight"] = (experts.count, hidden)
    ffn = arch.ffn_hidden_size if experts is None else experts.ffn_hidden_size
    for i in [""] if experts is None else [f"experts.{i}." for i in range(experts.count)]:
        shapes[f"mlp.{i}gate_proj.weight"] = shapes[f"mlp.{i}up_proj.weight"] = (ffn, hidden)
        shapes[f"mlp.{i}down_proj.weight"] = (hidden, ffn)
    return shapes


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a HuggingFace model, by name; a tied output head is left out."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size),
        "model.norm.weight": (arch.hidden_size,),
    }
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    layer = _layer_shapes(arch)
    for i in range(arch.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_hf_weights(directory: str, arch: Architecture) -> dict[str, StoredTensor]:
    """The tensors of ``directory``, which are those of ``arch`` and no others.

    Raises:
        ValueError: as :func:`stored_tensors`, or a tensor is missing, superfluous, of another shape
            or quantised.
    """
    found, expected = stored_tensors(directory), expected_shapes(arch)
    # Copies and tables that other code writes along; they say nothing.
    ignored = {n for n in found if n.endswith("rotary_emb.inv_freq")}
    if arch.tie_word_embeddings:
        ignored.add("lm_head.weight")
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"{directory}: no tensor {name}, which config.json's {arch.model_type} has; is the "
                "copy complete, and config.json this model's?"
            )
        tensor = found[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json says "
                f"{list(shape)}; is config.json this model's?"
            )
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{tensor.file}: {name} is {tensor.dtype}, not one of {', '.join(_FLOATS)}; "
                "quantised models must be dequantised first"
            )
    for name in found.keys() - expected.keys() - ignored:
        raise ValueError(
            f"{found[name].file}: holds {name}, which config.json's {arch.model_type} with "
            f"{arch.num_layers} layers does not have; is config.json this model's?"
        )
    return {name: found[name] for name in expected}
