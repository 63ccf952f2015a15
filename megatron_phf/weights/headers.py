"""HuggingFace weight files: what their headers say, checked against the disk and the model.

Headers and file sizes only, no import of torch: the checks before launch read them too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_phf.files.foreign import (
    INDEX_FILE,
    WEIGHTS_FILE,
    RefusedJson,
    check_weight_index,
    parse_json,
    read_json_object,
    shown,
)
from megatron_phf.lora.config import CONFIG_FILE as ADAPTER_CONFIG
from megatron_phf.lora.config import hf_shape
from megatron_phf.model.architecture import Architecture

_FLOATS = ("F32", "BF16", "F16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK = 2**24


@dataclass(frozen=True)
class StoredTensor:
    """``file``: its path; ``dtype`` in safetensors' words (F32, BF16, F16).

    ``start`` and ``end``: where its bytes lie in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


def read_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file whose size is what its header says."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(min(length, size)).decode())
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + length + max((e["data_offsets"][1] for e in tensors.values()), default=0)
        found = {
            name: StoredTensor(
                path, e["dtype"], tuple(e["shape"]), *(8 + length + n for n in e["data_offsets"])
            )
            for name, e in tensors.items()
        }
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
    except RefusedJson as error:
        raise ValueError(f"{path}: its header {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file; copy it again") from error
    if size != expected:
        raise ValueError(
            f"{path}: {size} bytes, but its header describes {expected} (truncated?); copy it again"
        )
    return found


def _weight_files(directory: str) -> list[str]:
    """The names of the files that transformers reads: one, or those of an index.

    (``_get_resolved_checkpoint_files`` of its modeling_utils.py.)  What other programs read where
    both are there, or a file of another name, is not asked: refused.
    """
    check_weight_index(directory)
    names = set(os.listdir(directory))
    path = os.path.join(directory, INDEX_FILE)
    listed = set(read_json_object(path)["weight_map"].values()) if INDEX_FILE in names else set()
    if WEIGHTS_FILE in names:
        if listed - {WEIGHTS_FILE}:
            raise ValueError(
                f"{directory}: {WEIGHTS_FILE} and {INDEX_FILE} with other files: some programs "
                "read the one, some the others; remove what is not the model's"
            )
        return [WEIGHTS_FILE]
    if listed:
        return sorted(listed)
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise ValueError(
            f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE}, but {shown(others[0])}; rename "
            "the file, or copy the index"
        )
    pickled = sorted(n for n in names if n.startswith("pytorch_model") and n.endswith(".bin"))
    if pickled:
        raise ValueError(
            f"{directory}: no *.safetensors in it, only {pickled[0]}, which is pickle and is not "
            "read; write the model again with transformers' save_pretrained"
        )
    raise ValueError(f"{directory}: no *.safetensors in it; convert or copy the model again")


def stored_tensors(directory: str) -> dict[str, StoredTensor]:
    """The tensors of ``directory`` by name: those that transformers loads from there.

    Raises:
        ValueError: no safetensors, a file is missing, truncated or damaged, the index names a
            tensor that its file does not hold, or it is not clear which files are the model.
    """
    files = _weight_files(directory)
    adapter = os.path.join(directory, ADAPTER_CONFIG)
    if os.path.lexists(adapter):
        raise ValueError(
            f"{adapter}: transformers adds this adapter to the model beside it; merge it "
            "(tools/convert_checkpoint.py merge-adapter), or move it elsewhere"
        )
    path = os.path.join(directory, INDEX_FILE)
    index = read_json_object(path)["weight_map"] if os.path.isfile(path) else {}
    found: dict[str, StoredTensor] = {}
    for name in files:
        tensors = read_header(os.path.join(directory, name))
        for tensor in tensors.keys() & found.keys():
            raise ValueError(
                f"{directory}: {tensor} is in {name} and in {os.path.basename(found[tensor].file)};"
                " copy the model again"
            )
        found |= tensors
    for tensor, name in index.items():
        if tensor not in found:
            raise ValueError(f"{directory}: {name} does not hold {tensor}; copy the model again")
    return found


def _same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open(first.file, "rb") as a, open(second.file, "rb") as b:
        a.seek(first.start)
        b.seek(second.start)
        left = first.end - first.start
        while left > 0:
            one, other = a.read(min(left, _CHUNK)), b.read(min(left, _CHUNK))
            if one != other or not one:
                return False
            left -= len(one)
    return True


def _check_tied_head(found: Mapping[str, StoredTensor]) -> None:
    """A tied head in the files must be the embedding: transformers computes with both otherwise."""
    head, embedding = found.get(_HEAD), found.get(_EMBEDDING)
    if head is not None and embedding is not None and not _same_bytes(head, embedding):
        raise ValueError(
            f"{head.file}: {_HEAD} is not {_EMBEDDING}, but config.json has tie_word_embeddings "
            "true; set it to false there if the model has a head of its own, else remove the tensor"
        )


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
    rows = arch.stored_vocab_size or arch.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (rows, arch.hidden_size),
        "model.norm.weight": (arch.hidden_size,),
    }
    if not arch.tie_word_embeddings:
        shapes[_HEAD] = (rows, arch.hidden_size)
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
        _check_tied_head(found)
        ignored.add(_HEAD)
    for name, tensor in found.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{tensor.file}: {name} is {tensor.dtype}, not one of {', '.join(_FLOATS)}; "
                "quantised models must be dequantised first"
            )
    fused = next(
        (n for n in found if n.endswith((".experts.gate_up_proj", ".experts.down_proj"))), ""
    )
    if fused and arch.experts is not None:
        raise ValueError(
            f"{found[fused].file}: {fused} holds all experts in one tensor, as transformers 5 has "
            "them in memory; write the model with its save_pretrained, which splits them"
        )
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
    for name in found.keys() - expected.keys() - ignored:
        raise ValueError(
            f"{found[name].file}: holds {name}, which config.json's {arch.model_type} with "
            f"{arch.num_layers} layers does not have; is config.json this model's?"
        )
    return {name: found[name] for name in expected}
