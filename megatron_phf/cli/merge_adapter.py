"""A PEFT adapter merged into the HuggingFace model it was trained on, tensor by tensor.

    python -m megatron_phf.cli.merge_adapter JOB.json

One process for tools/convert_checkpoint.py, which has checked the job.  It holds the adapter, one
file of the target and one tensor.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_phf.cli.main import leave_on_error
from megatron_phf.config.settings import Config
from megatron_phf.lora.files import merge_adapter, read_adapter
from megatron_phf.model.architecture import read_architecture
from megatron_phf.weights.adapters import check_adapter
from megatron_phf.weights.headers import StoredTensor, check_hf_weights
from megatron_phf.weights.hf_directory import copy_model_files, write_shards

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _read(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    for path in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(path, "pt") as f:
            for name, tensor in stored.items():
                if tensor.file == path:
                    yield name, f.get_tensor(name)


def merge(job: dict) -> None:
    """Write ``source`` + ``adapter`` to the new directory ``target``.

    Raises:
        ValueError: they do not fit, or the target cannot be written.
    """
    arch = read_architecture(job["source"])
    stored = check_hf_weights(job["source"], arch)
    check_adapter(job["adapter"], arch)
    adapter, scale = read_adapter(job["adapter"])
    dtype = _DTYPES[job["dtype"]]
    merged = merge_adapter(_read(stored), adapter, scale, dtype)
    try:
        os.makedirs(job["target"])
        write_shards(merged, job["target"], job["max_shard_bytes"])
        copy_model_files(job["source"], job["target"], dtype, Config().tokenizer)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{job['target']}: cannot be written ({error})") from error


def main(path: str) -> None:
    """Run the job in this file."""
    with open(path, encoding="utf-8") as f:
        merge(json.load(f))


if __name__ == "__main__":
    leave_on_error(lambda: main(sys.argv[1]))
