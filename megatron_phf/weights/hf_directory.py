"""Writing a HuggingFace model directory: weights in shards with an index, and all other files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_phf.config.settings import TokenizerConfig
from megatron_phf.files.foreign import INDEX_FILE, read_json_object
from megatron_phf.files.replace import write_json
from megatron_phf.weights.model_files import copy_files, other_files, tokenizer_files

SHARD_BYTES = 5 * 10**9


def write_shards(
    weights: Iterable[tuple[str, Tensor]], directory: str, max_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors of at most ``max_bytes`` each (one tensor at least), and their index.

    One file's tensors are held at a time; safetensors writes them without a copy.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        save_file(pending, os.path.join(directory, f"{len(shards)}.part"), {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, weight in weights:
        if pending and held + weight.nbytes > max_bytes:
            flush()
            held = 0
        # A part of a larger tensor would keep all of it alive.
        whole = weight.untyped_storage().nbytes() == weight.nbytes
        pending[name] = weight.cpu().contiguous() if whole else weight.cpu().clone()
        held += weight.nbytes
        total += weight.nbytes
    if pending:
        flush()
    _name_shards(shards, directory, total)


def _name_shards(shards: list[list[str]], directory: str, total: int) -> None:
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    for i, name in enumerate(names):
        os.replace(os.path.join(directory, f"{i}.part"), os.path.join(directory, name))
    if count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {w: f for f, shard in zip(names, shards, strict=True) for w in shard},
        }
        write_json(os.path.join(directory, INDEX_FILE), index)


def copy_model_files(
    source: str, target: str, dtype: torch.dtype, tokenizer: TokenizerConfig
) -> None:
    """Everything of the model directory ``source`` that is not weights; ``dtype`` in its config.

    The tokenizer is that of ``--tokenizer-model`` where the run has one.
    """
    other = tokenizer.tokenizer_model
    if other is None:
        copy_files(source, target, tokenizer_files(source))
    elif tokenizer.tokenizer_type == "SentencePieceTokenizer":
        shutil.copyfile(other, os.path.join(target, "tokenizer.model"))
    else:
        copy_files(other, target, tokenizer_files(other))
    copy_files(source, target, other_files(source))
    path = os.path.join(target, "config.json")
    content = read_json_object(path)
    content.pop("torch_dtype", None)
    content.pop("quantization_config", None)  # the weights beside it are not quantised
    content["dtype"] = str(dtype).removeprefix("torch.")
    write_json(path, content, indent=2)
