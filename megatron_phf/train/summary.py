"""The start-up summary: model, layout, memory estimate, one aligned example."""

from __future__ import annotations

from megatron_phf.config.flags import departures, without_effect
from megatron_phf.config.schedule import decay_iters
from megatron_phf.config.settings import Config, MethodConfig, TrainConfig
from megatron_phf.config.teachers import teacher_names
from megatron_phf.data.rollouts import Rollout
from megatron_phf.data.tokenizer import Tokenizer
from megatron_phf.estimate.memory import Machine, memory_estimate
from megatron_phf.lora.config import num_adapter_parameters, target_modules
from megatron_phf.losses import OBJECTIVES
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.gpt_config import model_dtype, transformer_impl
from megatron_phf.runtime import device, parallel
from megatron_phf.runtime.kernels import feature_table
from megatron_phf.teacher.architecture import Models, layer_map

_SHOWN_TOKENS = 12


def _teacher_lines(models: Models, config: Config) -> list[str]:
    """What is said of a teacher that is another model."""
    arch, teacher = models.student, models.other
    if teacher is None:
        return []
    layers = layer_map(config, arch.num_layers, teacher.num_layers)
    flow = "" if teacher.hidden_size == arch.hidden_size else ", no direction term"
    names = teacher_names(config)
    several = [f"teachers {', '.join(names)}: one at a time"] if len(names) > 1 else []
    return [
        f"teacher  {teacher.model_type}, {teacher.num_layers} layers, hidden "
        f"{teacher.hidden_size}, {teacher.num_parameters() / 1e6:.1f} M parameters{flow}; its "
        f"layers for the student's: {','.join(str(layer) for layer in layers)}",
        *several,
    ]


def _trainable(arch: Architecture, config: Config) -> str:
    """How many of the parameters are trained, of the whole model, without padding."""
    total, lora = arch.num_parameters(), config.lora
    if not lora.lora_rank:
        return f"{total / 1e6:.1f} M trainable of {total / 1e6:.1f} M parameters"
    trained = num_adapter_parameters(arch, lora)
    total += trained
    return (
        f"{trained / 1e6:.2f} M trainable of {total / 1e6:.1f} M parameters "
        f"({100 * trained / total:.2f} %): LoRA rank {lora.lora_rank}, alpha {lora.lora_alpha:g}, "
        f"dropout {lora.lora_dropout:g} on {','.join(target_modules(lora))}"
    )


def _recipe_line(config: Config) -> str:
    """Which preset a run started from, and each flag that departs from it."""
    preset = config.recipe.preset
    if preset is None:
        return "recipe   no preset (--preset phf is the published one)"
    changed = departures(config)
    return f"recipe   preset {preset}; " + (
        f"departs from it: {', '.join(changed)}" if changed else "as it stands"
    )


def _rate(train: TrainConfig) -> str:
    if train.lr_decay_style == "constant":
        return f"{train.lr:g}, constant"
    return (
        f"{train.lr:g}, {train.lr_decay_style} to {train.min_lr:g} over {decay_iters(train)} steps "
        f"({train.train_iters} are run)"
    )


def run_summary(models: Models, config: Config) -> str:
    """The block printed before the first step."""
    arch, p, t, m = models.student, config.parallel, config.train, config.method
    machine = Machine(model_dtype(config).itemsize, parallel.data_parallel_size())
    memory = memory_estimate(models, config, machine)
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
    virtual = p.num_virtual_stages_per_pipeline_rank
    cut = "" if p.expert_tensor_parallel_size is None else f", ETP {p.expert_tensor_size}"
    expert = "" if arch.experts is None else f" (EP {p.expert_model_parallel_size}{cut})"
    context = "" if p.context_parallel_size == 1 else f" x CP {p.context_parallel_size}"
    return "\n".join(
        (
            f"model    {arch.model_type}, {arch.num_layers} layers, hidden {arch.hidden_size}, "
            f"{str(model_dtype(config)).removeprefix('torch.')}, {transformer_impl(config)} layers",
            *_teacher_lines(models, config),
            *([] if config.is_embedded else [_recipe_line(config)]),
            f"trained  {_trainable(arch, config)}",
            f"layout   TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size}"
            f" (virtual {virtual}){context} x DP {parallel.data_parallel_size()}{expert}, "
            f"sequence parallel {'on' if p.sequence_parallel else 'off'}, "
            f"distributed optimizer {'on' if p.use_distributed_optimizer else 'off'}",
            f"device   {device.describe()}",
            feature_table(config, transformer_impl(config)),
            f"rate     {_rate(t)}",
            f"batch    {t.global_batch_size} rollouts a step, {_microbatches(config)}",
            f"method   alpha {m.phf_alpha}, window {m.phf_window_size} ({m.phf_window_rule}); "
            f"{_output_loss(m)}; teacher {m.teacher}",
            *(f"note     {text}" for text in without_effect(config)),
            f"memory   {sum(memory.values()):.2f} GiB a rank, activations aside ({parts})",
        )
    )


def _output_loss(m: MethodConfig) -> str:
    """What counts of the output loss's settings."""
    if m.opsd_weight == 0:
        return "no output loss"
    if OBJECTIVES[m.opsd_objective].needs_targets:
        return f"{m.opsd_objective}, temperature {m.opsd_temperature}, without beta and clip"
    clip = "no clip" if m.opsd_clip_mode == "none" else f"clip {m.opsd_clip_mode} {m.opsd_clip}"
    return f"{m.opsd_objective} beta {m.opsd_beta}, temperature {m.opsd_temperature}, {clip}"


def _microbatches(config: Config) -> str:
    budget = config.batching.max_tokens_per_microbatch
    if budget == 0:
        return f"microbatches of {config.train.micro_batch_size}"
    kind = "packed" if config.batching.pack_sequences else "padded"
    return f"microbatches of at most {budget} {kind} tokens"


def _text(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def aligned_example(rollout: Rollout, tokenizer: Tokenizer | None) -> str:
    """One rollout as both models read it: prompts, and where each response token sits in each."""
    student, teacher = rollout.student_prompt_ids, rollout.teacher_prompt_ids
    lines = ["--- one aligned example ---"]
    if tokenizer is not None:
        lines += [f"student prompt: {_text(tokenizer, student)!r}"]
        lines += [f"teacher prompt: {_text(tokenizer, teacher)!r}"]
        lines += [f"response:       {_text(tokenizer, rollout.response_ids)!r}"]
    lines += ["generated  token id  text            student position  teacher position"]
    for i, token in enumerate(rollout.response_ids[:_SHOWN_TOKENS]):
        text = "" if tokenizer is None else repr(_text(tokenizer, (token,)))
        note = "" if rollout.scored[i] else "  not the student's: not scored"
        lines.append(
            f"{i:>9}  {token:>8}  {text:<14}  {len(student) + i:>16}  {len(teacher) + i:>16}{note}"
        )
    if len(rollout.response_ids) > _SHOWN_TOKENS:
        lines.append(f"      ...  ({len(rollout.response_ids)} tokens in all)")
    return "\n".join(lines)
