"""Fused kernels: which are there, which are used, and why not."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from megatron.core.utils import is_te_min_version

from megatron_phf.config.settings import Config
from megatron_phf.runtime import device, optional_packages


@dataclass(frozen=True)
class Feature:
    """One line of the table."""

    name: str
    on: bool
    why: str


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return names[0]


def layers(implementation: str) -> Feature:
    """Transformer Engine's linears, norms and attention."""
    if implementation == "transformer_engine":
        return Feature("Transformer Engine layers", True, _version("transformer_engine"))
    missing = optional_packages.why_missing("transformer_engine")
    return Feature("Transformer Engine layers", False, missing or "--transformer-impl local")


def rope(implementation: str) -> Feature:
    """Rotary embedding as one kernel."""
    name = "fused rotary embedding"
    if not device.has_cuda():
        return Feature(name, False, "no CUDA")
    if implementation != "transformer_engine":
        return Feature(name, False, "needs --transformer-impl transformer_engine")
    new = is_te_min_version("2.3.0")
    return Feature(name, new, "Transformer Engine" if new else "needs Transformer Engine 2.3")


def gradient_accumulation(config: Config) -> Feature:
    """Weight gradients added to fp32 sums by the GEMM itself."""
    name = "gradient accumulation fusion"
    if not config.parallel.gradient_accumulation_fusion:
        return Feature(name, False, "--no-gradient-accumulation-fusion")
    if not device.has_cuda():
        return Feature(name, False, "no CUDA")
    if config.lora.lora_rank:
        return Feature(name, False, "--lora-rank: no gradients of whole weights")
    if not device.has_module("fused_weight_gradient_mlp_cuda"):
        return Feature(name, False, "NVIDIA's apex, built with its CUDA extensions, is missing")
    return Feature(name, True, "apex")


def fp8(config: Config) -> Feature:
    """FP8 GEMMs in the student's training pass."""
    chosen = config.fp8
    if chosen.fp8_format is None:
        return Feature("FP8", False, "no --fp8-format")
    parts = [f"{chosen.fp8_format}, {chosen.fp8_recipe} scaling"]
    parts += ["weights in FP8"] * chosen.fp8_param_gather
    if chosen.first_last_layers_bf16:
        first, last = chosen.num_layers_at_start_in_bf16, chosen.num_layers_at_end_in_bf16
        parts.append(f"first {first} and last {last} layers in bf16")
    return Feature("FP8", True, "; ".join(parts))


def adam() -> Feature:
    """The optimizer's update as one kernel, as megatron-core chooses it."""
    for package, name in (("transformer_engine", "Transformer Engine"), ("apex", "apex")):
        if device.has_cuda() and device.has_module(package):
            return Feature("fused Adam", True, name)
    return Feature("fused Adam", False, "needs CUDA with Transformer Engine or NVIDIA's apex")


def features(config: Config, implementation: str) -> list[Feature]:
    """The table's lines."""
    engine, cuda = implementation == "transformer_engine", device.has_cuda()
    norm = "with the linear behind it" if engine else "torch's RMSNorm"
    attention = "Transformer Engine (flash or cuDNN)" if engine else "torch's fused attention"
    layout = config.parallel
    reduction, gather = layout.overlap_grad_reduce, layout.overlap_param_gather
    return [
        layers(implementation),
        fp8(config),
        Feature("fused RMSNorm", True, norm),
        Feature("fused attention", True, attention),
        rope(implementation),
        Feature("fused SwiGLU", cuda, "megatron-core, compiled" if cuda else "no CUDA"),
        Feature("output head and loss in chunks", True, "no logits are kept"),
        gradient_accumulation(config),
        adam(),
        Feature("TP communication in GEMMs", layout.tp_comm_overlap, "--tp-comm-overlap"),
        Feature("gradient reduction in backward", reduction, "--overlap-grad-reduce"),
        Feature("weight gather behind a step", gather, "--overlap-param-gather"),
    ]


def feature_table(config: Config, implementation: str) -> str:
    """One aligned line a feature: its name, on or off, and why."""
    rows = features(config, implementation)
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"kernel   {row.name:<{width}}  {'on ' if row.on else 'off'}  {row.why}" for row in rows
    )
