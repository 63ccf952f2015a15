"""Whether an adapter directory is whole and fits its model, judged by its files' headers."""

from __future__ import annotations

import os
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.lora.config import (
    CONFIG_FILE,
    TARGETS,
    WEIGHTS_FILE,
    adapted_modules,
    read_adapter_config,
    target_modules,
)
from megatron_phf.model.architecture import Architecture
from megatron_phf.weights.headers import expected_shapes, read_header

_PEFT = "base_model.model."


def check_adapter(directory: str, arch: Architecture) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a PEFT adapter of ``arch``, and the modules that it adapts.

    Raises:
        ValueError: it is no plain LoRA, its tensors are not those that its configuration names, or
            they do not fit the model.
    """
    content = read_adapter_config(directory)
    path = os.path.join(directory, WEIGHTS_FILE)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file (adapters in PEFT's safetensors format only)")
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_shapes(arch).items()
        if name.removesuffix(".weight").rpartition(".")[2] in TARGETS and name.endswith(".weight")
    }
    modules = adapted_modules(content, shapes, os.path.join(directory, CONFIG_FILE))
    expected: dict[str, tuple[int, ...]] = {}
    for module in modules:
        rows, columns = shapes[module]
        expected[f"{_PEFT}{module}.lora_A.weight"] = (content["r"], columns)
        expected[f"{_PEFT}{module}.lora_B.weight"] = (rows, content["r"])
    tensors = read_header(path)
    for name in sorted(tensors.keys() ^ expected.keys()):
        there = "is not in it" if name in expected else "is in it"
        raise ValueError(
            f"{path}: {name} {there}, against its {CONFIG_FILE} (target_modules) and this model; "
            "copy the adapter again, or name the model that it was trained on"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, but r in its {CONFIG_FILE} "
                f"and this model need {list(shape)}"
            )
    return content, modules


def check_start(config: Config, arch: Architecture) -> None:
    """Raise ValueError unless --lora-adapter is what the flags say, on every layer of ``arch``."""
    lora = config.lora
    if lora.lora_adapter is None:
        return
    content, modules = check_adapter(lora.lora_adapter, arch)
    ends = [module.rpartition(".")[2] for module in modules]
    found = tuple(target for target in TARGETS if target in ends)
    for target in found:
        if ends.count(target) != arch.num_layers:
            raise ValueError(
                f"--lora-adapter {lora.lora_adapter}: adapts {target} in {ends.count(target)} of "
                f"{arch.num_layers} layers; training goes on with adapters on all of them alone: "
                "merge it into its model (tools/convert_checkpoint.py merge-adapter)"
            )
    flags = (lora.lora_rank, lora.lora_alpha, target_modules(lora))
    if (content["r"], content["lora_alpha"], found) != flags:
        raise ValueError(
            f"--lora-adapter {lora.lora_adapter} was trained otherwise; pass --lora-rank "
            f"{content['r']} --lora-alpha {content['lora_alpha']} --lora-target-modules "
            f"{','.join(found)}"
        )
