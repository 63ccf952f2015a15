"""Weights between HuggingFace and Megatron: what each rank of tools/convert_checkpoint.py does.

    python -m megatron_phf.cli.convert JOB.json ...    (or torchrun -m, for TP x PP processes)

The tool has checked the job, and moves what is written here to its place.  Always on the CPU, in
bounded memory: a rank holds its part of the model and a few copies of one tensor; rank 0 of an
export one file besides.
"""

# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_phf.files.replace import write_json, write_text
from megatron_phf.runtime import device

device.import_megatron()  # before anything else does

from megatron_phf.cli.main import leave_on_error
from megatron_phf.config.settings import Config
from megatron_phf.lora.files import save_peft_adapter
from megatron_phf.lora.linears import add_adapters
from megatron_phf.model.architecture import Architecture, check_split, read_architecture
from megatron_phf.model.gpt import FlowGPTModel, build_model
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_first_rank
from megatron_phf.train import checkpoint_files as files
from megatron_phf.train.export import export_probe
from megatron_phf.train.logging import say
from megatron_phf.weights import torch_dist
from megatron_phf.weights.hf_directory import copy_model_files
from megatron_phf.weights.huggingface import load_hf_weights, save_hf
from megatron_phf.weights.sharded import load_weights, save_weights

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_EMBEDDING = "embedding.word_embeddings.weight"
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion.

    Args:
        source: HuggingFace directory, or the directory of one Megatron checkpoint.
        target: directory to write; the tool renames it.
        hf_model: where configuration and tokenizer come from.
        dtype: of the target, ``fp32`` or ``bf16``; None keeps that of a Megatron source.
        probe: also compute logits with what was written, into this file.
        lora: the LoRA flags of a Megatron source that was trained with them.
    """

    action: str
    source: str
    target: str
    hf_model: str
    dtype: str | None
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    max_shard_bytes: int
    probe: str | None
    lora: dict[str, Any] | None = None

    def config(self, dtype: str) -> Config:
        """The model's settings with weights of ``dtype``."""
        tp = self.tensor_model_parallel_size
        return Config().replaced(
            hf_model=self.hf_model,
            dtype=dtype,
            pad_attention_heads=True,
            sequence_parallel=tp > 1,  # megatron-core's rule for models with experts
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            max_prompt_length=1,
            max_teacher_prompt_length=1,
            **(self.lora or {}),
        )


def _bytes(chunks: list[FlowGPTModel]) -> int:
    return sum(p.nbytes for chunk in chunks for p in chunk.parameters())


def _report_memory(chunks: list[FlowGPTModel], before: int) -> None:
    """Say what the conversion cost: the greatest rank's weights, and its peak."""
    mine = torch.tensor([_bytes(chunks), device.peak_memory_bytes() - before])
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    weights, peak = (f"{int(value) / _MIB:.1f}" for value in mine)
    say(f"memory   {weights} MiB of weights a rank, peak {peak} MiB above the start")


@torch.no_grad()
def write_probe(
    chunks: list[FlowGPTModel], arch: Architecture, dtype: torch.dtype, path: str
) -> None:
    """Write token sequences and their next-token logits, for ``tools/check_export.py``.

    Weights are rounded to ``dtype`` and then computed with in fp32, in place.
    """
    for chunk in chunks:
        for p in chunk.parameters():
            p.data = p.data.to(dtype).float()
        chunk.config.params_dtype = chunk.config.pipeline_dtype = torch.float32
        chunk.config.bf16 = False
    on_first_rank(save_file, export_probe(chunks, arch, 2, 16), path)


def _write_rest(job: Job, directory: str, dtype: str) -> None:
    hf = os.path.join(directory, "hf")
    os.makedirs(hf, exist_ok=True)
    copy_model_files(job.hf_model, hf, _DTYPES[dtype], Config().tokenizer)
    manifest = {
        "format": files.FORMAT,
        "dtype": str(_DTYPES[dtype]),
        "files": files.settle(directory, files.files_below(directory)),
    }
    write_json(os.path.join(directory, files.MANIFEST), manifest)
    write_text(os.path.join(job.target, files.TRACKER), files.RELEASE)


def hf_to_megatron(job: Job, arch: Architecture) -> None:
    """Write the weights of ``source`` as a Megatron checkpoint, its configuration under ``hf``."""
    assert job.dtype is not None
    config = job.config(job.dtype)
    before = psutil.Process().memory_info().rss
    chunks = build_model(arch, config)
    load_hf_weights(chunks, arch, config, job.source)
    directory = os.path.join(job.target, files.RELEASE)
    save_weights(chunks, directory)
    on_first_rank(_write_rest, job, directory, job.dtype)
    _report_memory(chunks, before)
    if job.probe is not None:
        for chunk in chunks:  # what the logits come from can only be what lies on the disk
            for p in chunk.parameters():
                p.data.fill_(torch.nan)
        load_weights(chunks, directory)
        write_probe(chunks, arch, _DTYPES[job.dtype], job.probe)


def _stored_dtype(directory: str) -> str:
    entry = torch_dist.read_index(directory).state_dict_metadata.get(_EMBEDDING)
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    if dtype not in _NAMES:
        raise ValueError(
            f"{directory}: {_EMBEDDING} is {dtype or 'not there'}; need the weights of a GPT model "
            "in fp32 or bf16"
        )
    return _NAMES[dtype]


def _export(
    job: Job,
    arch: Architecture,
    dtype: str | None,
    save: Callable[[list[FlowGPTModel], Config, torch.dtype], None],
) -> None:
    """Load the checkpoint, ``save`` it, and write the probe of what was saved."""
    stored = _stored_dtype(job.source)
    config, kept = job.config(stored), _DTYPES[dtype or stored]
    before = psutil.Process().memory_info().rss
    chunks = build_model(arch, config)
    if job.lora is not None:
        add_adapters(chunks, arch, config)
    load_weights(chunks, job.source)
    save(chunks, config, kept)
    _report_memory(chunks, before)
    if job.probe is not None:
        write_probe(chunks, arch, kept, job.probe)


def megatron_to_hf(job: Job, arch: Architecture) -> None:
    """Write the weights of ``source`` as a HuggingFace directory, adapters merged into them."""

    def save(chunks: list[FlowGPTModel], config: Config, dtype: torch.dtype) -> None:
        limit = job.max_shard_bytes
        save_hf(chunks, arch, config, job.hf_model, job.target, dtype=dtype, max_shard_bytes=limit)

    _export(job, arch, job.dtype, save)


def adapter_to_peft(job: Job, arch: Architecture) -> None:
    """Write the adapters of ``source`` as a PEFT directory; its base is ``hf_model``."""
    _export(
        job, arch, None, lambda chunks, config, _: save_peft_adapter(chunks, config, job.target)
    )


ACTIONS: dict[str, Callable[[Job, Architecture], None]] = {
    "hf-to-megatron": hf_to_megatron,
    "megatron-to-hf": megatron_to_hf,
    "adapter-to-peft": adapter_to_peft,
}


def run(job: Job) -> None:
    """Convert, in the job's layout; every rank calls it.

    Raises:
        ValueError: the source is damaged, or the target cannot be written.
    """
    arch = read_architecture(job.hf_model)
    config = job.config("fp32")
    check_split(arch, config)
    parallel.initialize(config.parallel)
    try:
        ACTIONS[job.action](job, arch)
    except OSError as error:
        raise ValueError(f"{job.target}: cannot be written ({error})") from error
    parallel.destroy_model_parallel()


def main(paths: list[str]) -> None:
    """Join the other ranks and run the jobs in these files, one after the other."""
    device.setup()
    device.init_distributed(int(os.environ["LOCAL_RANK"]), timeout_minutes=30)
    for path in paths:
        with open(path, encoding="utf-8") as f:
            run(Job(**json.load(f)))
    dist.destroy_process_group()


if __name__ == "__main__":
    leave_on_error(lambda: main(sys.argv[1:]))
