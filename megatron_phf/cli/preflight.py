"""Everything that can be refused before a process group exists or a weight is read.

Without torch: ``examples/pretrain_phf.sh`` asks under bash before it launches anything, and each
rank asks again, with torchrun's real world size, before it joins the others.
"""

from __future__ import annotations

import math
import os
import sys

from megatron_phf.cli.gpu_flags import check_fp8_model, check_gpu, check_row
from megatron_phf.cli.job_paths import check_paths, training_paths
from megatron_phf.cli.processes import check_world_size, process_count, thread_count
from megatron_phf.cli.replay_check import check_replay
from megatron_phf.config.flags import parse_args
from megatron_phf.config.schedule import check_schedule
from megatron_phf.config.settings import Config, config_groups, flag_of
from megatron_phf.console import print_anything
from megatron_phf.data.problems import field_names, read_problems, read_test_problems
from megatron_phf.data.prompts import prompt_templates
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.evaluation.grader_process import check_grader
from megatron_phf.lora.config import check_lora, target_modules
from megatron_phf.model.architecture import (
    Architecture,
    check_split,
    parse_architecture,
    read_architecture,
)
from megatron_phf.rollout.engines import check_engine
from megatron_phf.rollout.megatron.flags import check_decoding
from megatron_phf.rollout.vllm.flags import check_vllm
from megatron_phf.runtime.visible_gpus import visible_gpus
from megatron_phf.teacher.architecture import (
    TEACHER_FLAG,
    check_flow,
    check_models,
    check_teacher_flags,
    read_teacher,
)
from megatron_phf.weights.headers import check_hf_weights

_AT_LEAST_ONE = {
    "parallel": (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "context_parallel_size",
        "expert_model_parallel_size",
        "recompute_num_layers",
    ),
    "train": ("train_iters", "global_batch_size", "micro_batch_size"),
    "checkpoint": ("max_consecutive_nonfinite_steps",),
    "rollout": ("max_new_tokens", "rollout_batch_size"),
    "data": ("max_prompt_length", "max_teacher_prompt_length"),
    "method": ("logits_chunk_tokens",),
    "model": ("make_vocab_size_divisible_by",),
    "embedded": ("demo_seeds", "eval_problems"),
    "evaluation": ("eval_samples",),
}


def _check_finite(config: Config) -> None:
    """No value that is not a number, and none that no counter could hold."""
    for group in config_groups():
        for name, value in vars(getattr(config, group)).items():
            if type(value) is float and not math.isfinite(value):
                raise ValueError(f"{flag_of(name)} {value}: need a finite number")
            if type(value) is int and abs(value) >= 2**40:
                raise ValueError(f"{flag_of(name)} {value:.3e}: too large a number")


def _check_numbers(config: Config) -> None:
    for group, names in _AT_LEAST_ONE.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            if value < 1:
                raise ValueError(f"{flag_of(name)} {value}: need at least 1")
    method, train = config.method, config.train
    ranges = (
        ("phf_alpha", method.phf_alpha, method.phf_alpha >= 0, "at least 0"),
        ("phf_window_size", method.phf_window_size, method.phf_window_size >= 2, "at least 2"),
        ("opsd_beta", method.opsd_beta, 0 <= method.opsd_beta <= 1, "0 to 1"),
        ("opsd_temperature", method.opsd_temperature, method.opsd_temperature > 0, "above 0"),
        ("opsd_clip", method.opsd_clip, method.opsd_clip > 0, "above 0"),
        ("opsd_top_k", method.opsd_top_k, method.opsd_top_k >= 0, "at least 0"),
        ("ema_decay", method.ema_decay, 0 <= method.ema_decay <= 1, "0 to 1"),
        ("lr", train.lr, train.lr >= 0, "at least 0"),
        ("min_lr", train.min_lr, 0 <= train.min_lr <= train.lr, "0 to --lr"),
        ("weight_decay", train.weight_decay, train.weight_decay >= 0, "at least 0"),
        ("adam_beta1", train.adam_beta1, 0 <= train.adam_beta1 < 1, "0 to below 1"),
        ("adam_beta2", train.adam_beta2, 0 <= train.adam_beta2 < 1, "0 to below 1"),
        ("adam_eps", train.adam_eps, train.adam_eps > 0, "above 0"),
        ("clip_grad", train.clip_grad, train.clip_grad >= 0, "at least 0"),
        ("seed", train.seed, 0 <= train.seed < 2**32, "0 to 2^32 - 1"),
    )
    for name, value, good, text in ranges:
        if not good:
            raise ValueError(f"{flag_of(name)} {value}: need {text}")


def _check_batching(config: Config) -> None:
    budget = config.batching.max_tokens_per_microbatch
    if budget < 0:
        raise ValueError(f"--max-tokens-per-microbatch {budget}: need at least 0 (0 is off)")
    if budget and config.parallel.num_virtual_stages_per_pipeline_rank > 1:
        raise ValueError(
            "--max-tokens-per-microbatch makes microbatches of different shapes, which "
            "megatron-core's interleaved schedule does not run; leave out "
            "--num-virtual-stages-per-pipeline-rank"
        )
    if budget and (config.train.micro_batch_size != 1 or config.is_embedded):
        raise ValueError(
            "--max-tokens-per-microbatch takes the place of --micro-batch-size and needs "
            "--hf-model; leave one of the two out"
        )
    if config.batching.pack_sequences and not budget:
        raise ValueError("--pack-sequences needs --max-tokens-per-microbatch, the tokens of a row")
    if config.batching.pack_sequences and config.parallel.context_parallel_size > 1:
        check_row(config, "--pack-sequences")


def _check_combinations(config: Config) -> None:
    parallel, rollout = config.parallel, config.rollout
    if config.recipe.preset is not None and config.is_embedded:
        raise ValueError(
            "--preset needs --hf-model and --data: the embedded task has settings of its own"
        )
    if parallel.context_parallel_size > 1 and config.is_embedded:
        raise ValueError("--context-parallel-size above 1 needs an --hf-model")
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size above 1")
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    if virtual > 1 and parallel.pipeline_model_parallel_size == 1:
        raise ValueError(
            "--num-virtual-stages-per-pipeline-rank above 1 needs "
            "--pipeline-model-parallel-size above 1"
        )
    if (config.model.hf_model is None) != (config.data.data is None):
        replaying = rollout.rollout_engine == "replay" and config.model.hf_model is not None
        if not replaying:
            raise ValueError(
                "--hf-model and --data belong together (without both: the embedded task)"
            )
    if (rollout.rollout_engine == "replay") != (rollout.replay_file is not None):
        raise ValueError("--replay-file and --rollout-engine replay belong together")
    if rollout.rollout_engine == "replay" and config.model.hf_model is None:
        raise ValueError("--rollout-engine replay needs --hf-model, the model of the recording")
    objective = config.method.opsd_objective
    if objective != "jsd" and config.method.opsd_top_k:
        raise ValueError(f"--opsd-top-k does not apply to --opsd-objective {objective}")


def _check_checkpoints(config: Config) -> None:
    c = config.checkpoint
    for name in ("save_interval", "keep_last"):
        if getattr(c, name) < 0:
            raise ValueError(f"{flag_of(name)} {getattr(c, name)}: need at least 0")
    for name in ("exit_interval", "exit_duration_in_mins"):
        value = getattr(c, name)
        if value is not None and value <= 0:
            raise ValueError(f"{flag_of(name)} {value}: need more than 0")
    if c.exact_checkpoint and c.load is None:
        raise ValueError("--exact-checkpoint needs --load")
    if c.save is None and (c.save_interval or c.async_save or c.keep_last):
        raise ValueError("--save-interval, --async-save and --keep-last need --save")
    if config.is_embedded and (c.save or c.load):
        raise ValueError("--save and --load need --hf-model: the embedded task is many short runs")


def _check_evaluation(config: Config) -> None:
    e = config.evaluation
    check_grader(e.grader)
    if e.eval_interval < 0:
        raise ValueError(f"--eval-interval {e.eval_interval}: need at least 0")
    if e.eval_max_new_tokens is not None and e.eval_max_new_tokens < 1:
        raise ValueError(f"--eval-max-new-tokens {e.eval_max_new_tokens}: need at least 1")
    if e.eval_temperature < 0 or not 0 < e.eval_top_p <= 1 or e.eval_top_k < 0:
        raise ValueError(
            f"--eval-temperature {e.eval_temperature}, --eval-top-p {e.eval_top_p}, --eval-top-k "
            f"{e.eval_top_k}: need at least 0, above 0 to 1, at least 0"
        )
    if e.eval_data is None and e.eval_interval:
        raise ValueError("--eval-interval needs --eval-data")
    if e.eval_data is not None:
        if config.model.hf_model is None:
            raise ValueError(
                "--eval-data needs --hf-model: the embedded task has problems of its own"
            )
        read_test_problems(e.eval_data, field_names(config.data), "--eval-data")


def _check_tokenizer(config: Config) -> None:
    kind, path = config.tokenizer.tokenizer_type, config.tokenizer.tokenizer_model
    if path is None:
        if kind == "SentencePieceTokenizer":
            raise ValueError(f"--tokenizer-type {kind} needs --tokenizer-model, the model file")
        return
    if config.model.hf_model is None:
        raise ValueError("--tokenizer-model needs --hf-model, the model it belongs to")
    if kind == "HFTokenizer" and not os.path.isdir(path):
        raise ValueError(
            f"--tokenizer-model {path}: no such directory (for a SentencePiece file: "
            "--tokenizer-type SentencePieceTokenizer)"
        )
    if kind == "SentencePieceTokenizer" and not os.path.isfile(path):
        raise ValueError(f"--tokenizer-model {path}: no such file")


def _check_expert_flags(arch: Architecture, config: Config) -> None:
    coefficient = config.model.moe_aux_loss_coeff
    if coefficient is not None and arch.experts is None:
        raise ValueError("--moe-aux-loss-coeff is for a model with experts; leave it out")
    if coefficient is not None and coefficient < 0:
        raise ValueError(f"--moe-aux-loss-coeff {coefficient}: need at least 0")
    teacher = read_teacher(arch, config)
    if config.parallel.expert_model_parallel_size > 1 and not (
        arch.experts or (teacher and teacher.experts)
    ):
        raise ValueError("--expert-model-parallel-size is for models with experts; leave it out")
    on_experts = {"gate_proj", "up_proj", "down_proj"} & set(target_modules(config.lora))
    if config.lora.lora_rank and arch.experts and on_experts:
        raise ValueError(
            "--lora-target-modules: adapters on experts are not available; use "
            "q_proj,k_proj,v_proj,o_proj"
        )


def _check_weights(config: Config) -> None:
    paths = {"--hf-model": config.model.hf_model, TEACHER_FLAG: config.teacher.teacher_hf_model}
    for flag, path in paths.items():
        if path is not None:
            try:
                check_hf_weights(path, read_architecture(path))
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from error


def check(config: Config) -> None:
    """Raise ValueError for anything wrong that does not depend on the number of processes."""
    _check_finite(config)
    _check_numbers(config)
    check_schedule(config)
    _check_batching(config)
    _check_combinations(config)
    check_teacher_flags(config)
    check_lora(config)
    check_engine(config)
    check_vllm(config)
    check_gpu(config)
    _check_checkpoints(config)
    if config.model.hf_model is not None:
        arch = read_architecture(config.model.hf_model)
        _check_expert_flags(arch, config)
        check_fp8_model(config, arch)
        check_models(config, config.model.hf_model)
        _check_weights(config)
    else:
        arch = parse_architecture(MODEL_CONFIG, "the embedded model")
        _check_expert_flags(arch, config)
        check_split(arch, config)
        check_flow(arch, config)
        check_fp8_model(config, arch)
    check_decoding(config, arch, visible_gpus())
    _check_tokenizer(config)
    _check_evaluation(config)
    data = config.data
    if data.data is not None and config.rollout.rollout_engine != "replay":
        read_problems(data.data, field_names(config.data))
    for path in (config.rollout.replay_file, data.student_template, data.teacher_template):
        if path is not None and not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    check_replay(arch, config)
    prompt_templates(data)


def main(argv: list[str] | None = None) -> int:
    """Check a command line; one error and status 2, or what torchrun needs.

    That is the number of processes, and of OMP threads a process.
    """
    print_anything()
    try:
        config = parse_args(argv)
        check(config)
        check_paths(training_paths(config), config)
        count = process_count(config, visible_gpus())
        check_world_size(config, count)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(count, thread_count(count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
