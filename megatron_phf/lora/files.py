"""Adapters in and out, in PEFT's directory format, and merged into the weights they belong to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.files.directories import write_directory
from megatron_phf.files.replace import write_json
from megatron_phf.lora.adapter import LowRankAdapter
from megatron_phf.lora.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_adapter_config,
    tensor_name,
)
from megatron_phf.lora.linears import adapted_linears
from megatron_phf.model.gpt import FlowGPTModel, wait_for_weights
from megatron_phf.runtime import parallel
from megatron_phf.runtime.together import on_every_rank

_PEFT = "base_model.model."


def _named_adapters(chunks: list[FlowGPTModel]) -> Iterator[tuple[int, str, LowRankAdapter]]:
    """(layer, target, adapter) of this rank."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for linear in adapted_linears([layer]):
                for target, adapter in linear.adapters.items():
                    yield layer.layer_number, target, adapter


def export_adapter(chunks: list[FlowGPTModel]) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, whole tensor) on every rank, one at a time; collective.

    Nothing at all for a model without adapters.
    """
    wait_for_weights(chunks)
    mine = list(_named_adapters(chunks))
    everywhere = parallel.gather_over_pipeline([(layer, target) for layer, target, _ in mine])
    shapes = parallel.gather_over_pipeline(
        [((a.lora_A.shape[0], a.shape[1]), (a.shape[0], a.lora_A.shape[0])) for _, _, a in mine]
    )
    like = next(chunks[0].parameters())
    for stage, names in enumerate(everywhere):
        for i, (layer, target) in enumerate(names):
            if stage == parallel.pipeline_rank():
                pair: tuple[Tensor, ...] = mine[i][2].whole()
            else:
                pair = tuple(like.new_empty(shape) for shape in shapes[stage][i])
            for matrix, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
                tensor = tensor.detach()
                parallel.broadcast_from_stage(tensor, stage)
                yield tensor_name(layer, target, matrix), tensor


def merge_adapter(
    weights: Iterable[tuple[str, Tensor]],
    adapter: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(HuggingFace name, weight) -> the same, W + scale lora_B lora_A where there is an adapter.

    Args:
        adapter: PEFT's names -> lora_A [r, in], lora_B [out, r].
        scale: lora_alpha / r.
        dtype: of what comes out; None keeps each weight's.

    The sum is made in fp32 and rounded once.
    """
    for name, weight in weights:
        base = _PEFT + name.removesuffix(".weight")
        a, b = (adapter.get(f"{base}.{matrix}.weight") for matrix in ("lora_A", "lora_B"))
        if a is not None and b is not None:
            delta = b.to(weight.device).float() @ a.to(weight.device).float()
            yield name, (weight.float() + scale * delta).to(dtype or weight.dtype)
        else:
            yield name, weight.to(dtype or weight.dtype)


def save_peft_adapter(
    chunks: list[FlowGPTModel], config: Config, target: str, flag: str = "--save-adapter"
) -> None:
    """Write the adapters to ``target``, which ``flag`` named, for ``peft`` and vLLM.

    Every rank calls.  Written beside and renamed at the end: ``target`` is whole, or as it was.

    Raises:
        ValueError: ``target`` cannot be written, on every rank.
    """
    first = parallel.is_first_rank()
    tensors: dict[str, Tensor] = {}
    for name, tensor in export_adapter(chunks):
        if first:
            tensors[name] = tensor.cpu().clone()

    def write(directory: str) -> None:
        save_file(tensors, os.path.join(directory, WEIGHTS_FILE), {"format": "pt"})
        write_json(os.path.join(directory, CONFIG_FILE), adapter_config(config), indent=2)

    write_directory(target, flag, write)


def read_adapter(directory: str) -> tuple[dict[str, Tensor], float]:
    """(tensors by PEFT's names, lora_alpha / r) of an adapter directory, for :func:`merge_adapter`.

    Raises:
        ValueError: it is missing, damaged, or not plain LoRA.
    """
    content = read_adapter_config(directory)
    path = os.path.join(directory, WEIGHTS_FILE)
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the adapter again") from error
    return tensors, float(content["lora_alpha"]) / float(content["r"])


def _load_local(chunks: list[FlowGPTModel], source: str) -> None:
    """Fill this rank's adapters."""
    path = os.path.join(source, WEIGHTS_FILE)
    try:
        with safe_open(path, "pt") as f:
            for layer, target, adapter in _named_adapters(chunks):
                names = (tensor_name(layer, target, matrix) for matrix in ("lora_A", "lora_B"))
                adapter.load(*map(f.get_tensor, names))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the adapter again") from error


def load_peft_adapter(chunks: list[FlowGPTModel], source: str) -> None:
    """Fill the adapters of ``chunks`` from PEFT's directory ``source``; every rank calls.

    That it fits was checked before (``weights.adapters.check_start``).

    Raises:
        ValueError: it cannot be read, on every rank.
    """
    on_every_rank(_load_local, chunks, source)
