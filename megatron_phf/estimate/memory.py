"""A rank's memory by formula, phase by phase: the start-up summary's lines and the planner's.

No import of torch: ``tools/plan.py`` asks without one.  tests/simulate holds it against the
simulation of every layout there.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_names
from megatron_phf.estimate.activations import (
    Microbatch,
    activation_bytes,
    last_layer_bytes,
    microbatch,
    output_loss_bytes,
    target_bytes,
    teacher_pass_bytes,
)
from megatron_phf.estimate.decoding import kv_cache_bytes, prefill_bytes
from megatron_phf.estimate.layer import Machine
from megatron_phf.estimate.stage import (
    StageParameters,
    adapter_parameters,
    stage_parameters,
)
from megatron_phf.teacher.architecture import Models, teacher_config
from megatron_phf.teacher.traits import traits_of

__all__ = [
    "Machine",
    "kv_cache_bytes",
    "last_layer_bytes",
    "memory_estimate",
    "peak_estimate",
    "phase_estimates",
]

_GIB = 2**30
Parts = dict[str, float]


@dataclass(frozen=True)
class _Held:
    """Bytes of one rank from step to step.

    ``weights``, ``gradients`` and ``optimizer`` of the student; the teacher's ``copy`` and fp32
    ``average``; ``placed``: the average as weights, in the teacher's pass; ``masters``: the part
    of the optimizer that its start makes; ``roots``: parameters whose optimizer state is here, of
    one optimizer (experts have their own); ``trained``: all that are, and ``experts`` of them;
    ``head``: bytes of the head, or of the embedding where the stage has no other.
    """

    weights: float
    gradients: float
    optimizer: float
    copy: float
    average: float
    placed: float
    masters: float
    roots: float
    trained: float
    experts: float
    head: float


def _optimized(found: StageParameters, config: Config, machine: Machine) -> tuple[float, float]:
    """Parameters whose optimizer state a rank keeps: (all, those of experts).

    Split over DP x CP; those of experts over what EP and ETP leave of all ranks of a stage.
    """
    if not config.parallel.use_distributed_optimizer:
        return found.total, found.experts
    p = config.parallel
    replicas = machine.replicas * p.context_parallel_size
    cut = p.expert_model_parallel_size * p.expert_tensor_size
    experts = found.experts / max(1.0, replicas * p.tensor_model_parallel_size / cut)
    return (found.total - found.experts) / replicas + experts, experts


def _teacher_sizes(
    models: Models, config: Config, machine: Machine, stage: int, adapters: float
) -> tuple[float, float]:
    """Bytes of the teacher's (own weights, fp32 average)."""
    width, traits = machine.width, traits_of(config)
    if models.other is not None:
        return stage_parameters(models.other, teacher_config(config), stage).total * width, 0.0
    if adapters:
        return 0.0, adapters * 4 * traits.average
    whole = stage_parameters(models.student, config, stage).total
    # An fp32 copy is its own average.
    return whole * width * traits.copy, whole * 4 * (traits.average and width != 4)


def _held(models: Models, config: Config, machine: Machine, stage: int) -> _Held:
    arch = models.student
    width, found = machine.width, stage_parameters(arch, config, stage)
    adapters = adapter_parameters(arch, config, stage) if config.lora.lora_rank else 0.0
    optimized, of_experts = _optimized(found, config, machine)
    if adapters:
        optimized, of_experts = _optimized(StageParameters(adapters, 0, 0, 0), config, machine)
    trained = adapters or found.total
    masters = 0 if width == 4 else 4
    copy, average = _teacher_sizes(models, config, machine, stage, adapters)
    return _Held(
        weights=(found.total + adapters) * width,
        gradients=trained * 4,
        optimizer=optimized * (8 + masters),
        copy=copy,
        average=average,
        placed=0.0 if copy or masters == 0 else average * width / 4,
        masters=optimized * masters,
        roots=max(optimized - of_experts, of_experts),
        trained=trained,
        experts=0.0 if adapters else found.experts,
        head=(found.head or found.embedding) * width,
    )


def _build(held: _Held, config: Config, machine: Machine) -> Parts:
    """The model twice, where DDP takes it into its buffers; or with the optimizer's weights."""
    away = config.teacher.teacher_offload
    teacher = 0.0 if away else held.copy + held.average
    # Experts have a buffer of their own, which comes last.
    buffer = (held.experts or held.trained) * machine.width
    if not config.parallel.use_distributed_optimizer:
        buffer = 0.0
    moments = [
        {"weights": held.weights, "teacher": held.copy + (0.0 if away else held.average)},
        {"weights": held.weights + buffer, "teacher": teacher, "gradients": held.gradients},
        {
            "weights": held.weights,
            "teacher": teacher,
            "gradients": held.gradients,
            "optimizer": held.masters,
        },
    ]
    return max(moments, key=lambda parts: sum(parts.values()))


def _steady(held: _Held, config: Config) -> Parts:
    """What is there all the time; an offloaded teacher and its average are on the host."""
    away = config.teacher.teacher_offload
    return {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "teacher": 0.0 if away else held.copy + held.average,
    }


def _heads(held: _Held, models: Models, config: Config, stage: int, more: int) -> float:
    """Output heads of teachers whose turn is over, and ``more``; the student's pass reads them."""
    if stage < config.parallel.pipeline_model_parallel_size - 1:
        return 0.0
    head = held.head * models.teacher.hidden_size / models.student.hidden_size
    return head * (max(0, len(teacher_names(config)) - 1) + more)


def _student(
    there: Parts, held: _Held, models: Models, config: Config, machine: Machine, batch: Microbatch,
    stage: int,
) -> Parts:  # fmt: skip
    """Activations, and either the output loss or what a layer's backward needs."""
    kept, momentary = activation_bytes(models.student, config, machine, batch, stage)
    loss = 0.0
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        loss = output_loss_bytes(models.student, config, machine, batch)
    # An offloaded teacher's stays too, until the pass is over.
    teacher = there["teacher"] + _heads(held, models, config, stage, config.teacher.teacher_offload)
    return {
        **there,
        "teacher": teacher,
        "activations": kept + (momentary if momentary > loss else 0.0),
        "output loss": loss if loss >= momentary else 0.0,
    }


def phase_estimates(
    models: Models, config: Config, machine: Machine, tokens: int, stage: int
) -> dict[str, Parts]:
    """GiB of a rank of pipeline stage ``stage`` at the peak of each phase, by holder.

    Args:
        tokens: padded ones of a microbatch of the student.
    """
    held = _held(models, config, machine, stage)
    batch, steady = microbatch(config, tokens), _steady(held, config)
    away = config.teacher.teacher_offload
    both = {**steady, "targets": target_bytes(models, config, machine, batch, stage)}
    # torch's Adam on lists makes a root of every second moment; on a CPU of one at a time.
    roots = held.roots * 4 if machine.cuda and not machine.fused_adam else 0.0
    phases = {
        "build": _build(held, config, machine),
        "teacher": {
            **both,
            "teacher": steady["teacher"]
            + held.placed
            + (held.copy if away else 0.0)
            + _heads(held, models, config, stage, 0),
            "activations": teacher_pass_bytes(models, config, machine, batch),
        },
        "student": _student(both, held, models, config, machine, batch, stage),
        "optimizer": {**steady, "optimizer": steady["optimizer"] + roots},
        "decode": {
            **steady,
            "KV cache": kv_cache_bytes(models.student, config, machine, stage),
            "activations": prefill_bytes(models.student, config, machine),
        },
    }
    if held.average and not away:  # weight by weight: an fp32 copy of the largest
        copy = held.head * 4 / machine.width if held.copy else 0.0
        phases["teacher update"] = {**steady, "teacher": steady["teacher"] + copy}
    return {
        phase: {name: size / _GIB for name, size in parts.items()}
        for phase, parts in phases.items()
    }


def memory_estimate(models: Models, config: Config, machine: Machine) -> Parts:
    """GiB a rank, by formula: what training keeps, without activations and temporary buffers.

    Of the fullest pipeline stage.  Weights are split over TP, layers over the stages, experts over
    EP too.  Gradients are fp32; Adam keeps two fp32 moments and, for bf16 weights, an fp32 copy,
    all three split over DP x CP (those of experts over what EP leaves of it) with the distributed
    optimizer.  With LoRA only the adapters have gradients and optimizer state, and an EMA teacher
    is one more set of them.  ``targets``: see ``activations.target_bytes``.
    """
    data = config.data
    batch = microbatch(config, data.max_prompt_length + config.rollout.max_new_tokens)
    stages = []
    for stage in range(config.parallel.pipeline_model_parallel_size):
        held = _held(models, config, machine, stage)
        targets = target_bytes(models, config, machine, batch, stage)
        parts = {**_steady(held, config), "targets": targets}
        if config.teacher.teacher_offload:
            parts["teacher in its pass"] = parts.pop("teacher") + held.copy
        stages.append(parts)
    fullest = max(stages, key=lambda parts: sum(parts.values()))
    return {name: size / _GIB for name, size in fullest.items()}


def peak_estimate(
    models: Models, config: Config, machine: Machine, tokens: int, decode: bool = True
) -> Parts:
    """GiB a rank at the peak of a run with microbatches of ``tokens`` padded tokens, by holder.

    Of the fullest pipeline stage in its highest phase: build, teacher, student and optimizer are
    never there together.

    Args:
        decode: whether rollouts are decoded in process.
    """
    size = config.parallel.pipeline_model_parallel_size
    # Inner stages are alike, but for how many microbatches are under way: the first has most.
    stages = {0, 1, size - 1} & set(range(size))
    found = [
        parts
        for stage in sorted(stages)
        for phase, parts in phase_estimates(models, config, machine, tokens, stage).items()
        if decode or phase != "decode"
    ]
    return max(found, key=lambda parts: sum(parts.values()))
