"""The start-up summary's memory estimate: what training keeps on a rank, by formula."""

from __future__ import annotations

from megatron_phf import parallel
from megatron_phf.config import Config
from megatron_phf.model.adapter_config import num_adapter_parameters
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt import model_dtype
from megatron_phf.model.teacher_architecture import read_teacher

_GIB = 2**30


def _model_split(config: Config) -> int:
    p = config.parallel
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size


def _local_weights(arch: Architecture, config: Config) -> float:
    """Weights of one rank: experts are split over EP as well."""
    whole, experts = arch.num_parameters(), arch.num_expert_parameters()
    experts_here = experts / config.parallel.expert_model_parallel_size
    return (whole - experts + experts_here) / _model_split(config)


def _trained(arch: Architecture, config: Config) -> tuple[float, float]:
    """(trained parameters of one rank, those whose optimizer state it keeps)."""
    split, lora = _model_split(config), config.lora
    whole = num_adapter_parameters(arch, lora) if lora.lora_rank else arch.num_parameters()
    local = whole / split if lora.lora_rank else _local_weights(arch, config)
    if not config.parallel.use_distributed_optimizer:
        return local, local
    # Experts are split over what EP leaves of the replicas: in sum each is kept once.
    replicas = parallel.data_parallel_size() * config.parallel.context_parallel_size
    return local, whole / split / replicas


def _teacher_bytes(arch: Architecture, config: Config) -> float:
    width, kind = model_dtype(config).itemsize, config.method.teacher
    teacher = read_teacher(arch, config)
    if teacher is not None:
        return _local_weights(teacher, config) * width
    if kind == "live":
        return 0
    if config.lora.lora_rank:
        return _trained(arch, config)[0] * 4 if kind == "ema" else 0
    average = 4 if kind == "ema" and width != 4 else 0  # an fp32 copy is its own average
    return _local_weights(arch, config) * (width + average)


def _target_bytes(arch: Architecture, config: Config) -> float:
    method, new_tokens = config.method, config.rollout.max_new_tokens
    hidden = (read_teacher(arch, config) or arch).hidden_size
    sequences = config.train.global_batch_size / parallel.data_parallel_size()
    rows = sequences * new_tokens * hidden * model_dtype(config).itemsize
    if method.phf_alpha == 0:
        return rows
    transitions = min(method.phf_window_size, new_tokens) - 1
    layers = arch.num_layers / config.parallel.pipeline_model_parallel_size + 1
    numbers = hidden if hidden == arch.hidden_size else min(hidden, 2 * transitions)
    return rows + sequences * transitions * layers * numbers * 4


def memory_estimate(arch: Architecture, config: Config) -> dict[str, float]:
    """GiB a rank, by formula: what training keeps, without activations and temporary buffers.

    Weights are split over TP x PP, those of experts over EP too.  Gradients are fp32; Adam keeps
    two fp32 moments and, for bf16 weights, an fp32 copy, all three split over DP x CP (those of
    experts over what EP leaves of it) with the distributed optimizer.  With LoRA only the adapters
    have gradients and optimizer state, and an EMA teacher is one more set of them.  ``targets``:
    fp32 teacher directions of a full window, for each sequence of the local batch and each local
    layer (products of the window's length where they are smaller and enough), and the teacher's
    final hidden states of as many new tokens as allowed.
    """
    width = model_dtype(config).itemsize
    trained, optimized = _trained(arch, config)
    adapters = trained if config.lora.lora_rank else 0
    moments = 8 if width == 4 else 12
    teacher_key = "teacher in its pass" if config.teacher.teacher_offload else "teacher"
    sizes = {
        "weights": (_local_weights(arch, config) + adapters) * width,
        "gradients": trained * 4,
        "optimizer": optimized * moments,
        teacher_key: _teacher_bytes(arch, config),
        "targets": _target_bytes(arch, config),
    }
    return {name: size / _GIB for name, size in sizes.items()}
