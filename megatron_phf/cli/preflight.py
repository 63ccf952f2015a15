"""Everything that can be refused before a process group exists or a weight is read.

Without torch: ``examples/pretrain_phf.sh`` asks under bash before it launches anything, and each
rank asks again, with torchrun's real world size, before it joins the others.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from megatron_phf.cli.gpu_flags import check_fp8_model, check_gpu, check_row
from megatron_phf.cli.job_paths import check_paths, training_paths
from megatron_phf.cli.processes import check_world_size, process_count, thread_count
from megatron_phf.cli.replay_check import check_replay
from megatron_phf.config.flags import check_fields, parse_args
from megatron_phf.config.schedule import check_schedule
from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_directories
from megatron_phf.console import program
from megatron_phf.data.privileged import check_privileged
from megatron_phf.data.problems import field_names, read_test_problems
from megatron_phf.data.prompts import prompt_templates
from megatron_phf.data.vocabulary import has_tokenizer
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.evaluation.grader_process import check_grader
from megatron_phf.lora.config import target_modules
from megatron_phf.model.architecture import (
    parse_architecture,
)
from megatron_phf.rollout.engines import check_engine, reads_data
from megatron_phf.rollout.flags import check_rollouts
from megatron_phf.rollout.megatron.flags import check_decoding
from megatron_phf.rollout.vllm.flags import check_vllm
from megatron_phf.runtime.visible_gpus import visible_gpus
from megatron_phf.teacher.architecture import (
    Models,
    check_models,
    check_teacher_flags,
    flag_of_teacher,
    read_models,
)
from megatron_phf.weights.adapters import check_start
from megatron_phf.weights.headers import check_hf_weights


def _check_batching(config: Config) -> None:
    budget = config.batching.max_tokens_per_microbatch
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
    if config.batching.pack_sequences and config.parallel.context_parallel_size > 1:
        check_row(config, "--pack-sequences")


def _check_combinations(config: Config) -> None:
    parallel = config.parallel
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
    recorded, model = not reads_data(config), config.model.hf_model
    if (model is None) != (config.data.data is None) and not (recorded and model is not None):
        raise ValueError("--hf-model and --data belong together (without both: the embedded task)")
    if recorded != (config.rollout.replay_file is not None):
        raise ValueError("--replay-file and --rollout-engine replay belong together")
    if recorded and model is None:
        raise ValueError("--rollout-engine replay needs --hf-model, the model of the recording")


def _check_method(config: Config) -> None:
    method = config.method
    if method.opsd_objective != "jsd" and method.opsd_top_k:
        raise ValueError(f"--opsd-top-k does not apply to --opsd-objective {method.opsd_objective}")
    if method.opsd_weight == 0 and method.phf_alpha == 0:
        raise ValueError("--opsd-weight 0 needs --phf-alpha above 0: nothing else is trained on")


def _check_evaluation(config: Config) -> None:
    e = config.evaluation
    check_grader(e.grader)
    if e.eval_data is not None:
        read_test_problems(e.eval_data, field_names(config.data), "--eval-data")


def _check_tokenizer(config: Config) -> None:
    kind, path = config.tokenizer.tokenizer_type, config.tokenizer.tokenizer_model
    if path is None:
        if kind == "SentencePieceTokenizer":
            raise ValueError(f"--tokenizer-type {kind} needs --tokenizer-model, the model file")
        if config.model.hf_model is not None:
            needed = reads_data(config) or config.evaluation.eval_data is not None
            has_tokenizer(config.model.hf_model, "--hf-model", needed)
        return
    if kind == "HFTokenizer" and not os.path.isdir(path):
        raise ValueError(
            f"--tokenizer-model {path}: no such directory (for a SentencePiece file: "
            "--tokenizer-type SentencePieceTokenizer)"
        )
    if kind == "SentencePieceTokenizer" and not os.path.isfile(path):
        raise ValueError(f"--tokenizer-model {path}: no such file")
    if kind == "HFTokenizer":
        has_tokenizer(path, "--tokenizer-model", required=True)


def check_expert_flags(models: Models, config: Config) -> None:
    """Raise ValueError where a flag is about experts that the models have not, or have."""
    arch, coefficient = models.student, config.model.moe_aux_loss_coeff
    if coefficient is not None and arch.experts is None:
        raise ValueError("--moe-aux-loss-coeff is for a model with experts; leave it out")
    experts = arch.experts or models.teacher.experts
    layout = config.parallel
    if layout.expert_model_parallel_size > 1 and bool(arch.experts) != bool(models.teacher.experts):
        raise ValueError(
            "--expert-model-parallel-size above 1 needs experts in student and teacher alike; use "
            "1, or another --teacher-hf-model"
        )
    for flag, given in (
        ("--expert-model-parallel-size", layout.expert_model_parallel_size > 1),
        ("--expert-tensor-parallel-size", layout.expert_tensor_parallel_size is not None),
    ):
        if given and not experts:
            raise ValueError(f"{flag} is for models with experts; leave it out")
    on_experts = {"gate_proj", "up_proj", "down_proj"} & set(target_modules(config.lora))
    if config.lora.lora_rank and arch.experts and on_experts:
        raise ValueError(
            "--lora-target-modules: adapters on experts are not available; use "
            "q_proj,k_proj,v_proj,o_proj"
        )


def _check_weights(models: Models, config: Config) -> None:
    teachers = teacher_directories(config).items()
    for flag, path, arch in (
        ("--hf-model", config.model.hf_model, models.student),
        *((flag_of_teacher(name), path, models.teacher) for name, path in teachers),
    ):
        if path is not None:
            try:
                check_hf_weights(path, arch)
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from error


def _check_trackers(config: Config) -> None:
    """What rank 0 alone uses; a directory of a package's name is none."""
    output, first = config.output, os.environ.get("RANK", "0") == "0"
    packages = {
        "tensorboard": ("--tensorboard", output.tensorboard, "or add --no-tensorboard"),
        "wandb": ("--wandb-project", output.wandb_project is not None, "or leave the flag out"),
    }
    for name, (flag, on, remedy) in packages.items():
        spec = importlib.util.find_spec(name) if first and on else None
        if first and on and (spec is None or spec.origin is None):
            raise ValueError(f"{flag} needs the package {name}: pip install {name}, {remedy}")
    if first and output.wandb_project is not None:
        _check_wandb()


def _check_wandb() -> None:
    try:
        import wandb

        wandb.login()  # asks nobody for a key where there is no terminal
    except Exception as error:
        raise ValueError(
            f"--wandb-project: {' '.join(str(error).split())}; run `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline"
        ) from error


def check_settings(config: Config) -> None:
    """Raise ValueError for flags that are wrong whatever the models and the files."""
    _check_combinations(config)
    _check_method(config)
    check_fields(config)
    check_schedule(config)
    _check_batching(config)
    check_teacher_flags(config)
    target_modules(config.lora)
    check_engine(config)
    check_rollouts(config)
    check_vllm(config)
    check_gpu(config)


def check(config: Config) -> None:
    """Raise ValueError for anything wrong that does not depend on the number of processes."""
    check_settings(config)
    embedded = config.model.hf_model is None
    student = parse_architecture(MODEL_CONFIG, "the embedded model") if embedded else None
    models = read_models(config, student)
    check_expert_flags(models, config)
    check_fp8_model(config, models.student)
    check_models(models, config, tokenizers=reads_data(config))
    _check_weights(models, config)
    check_start(config, models.student)
    check_decoding(config, models.student, visible_gpus())
    _check_tokenizer(config)
    _check_evaluation(config)
    _check_trackers(config)
    data = config.data
    check_privileged(config, reads_data(config))
    for path in (config.rollout.replay_file, data.student_template, data.teacher_template):
        if path is not None and not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    check_replay(models, config)
    prompt_templates(data)


@program
def main(argv: list[str] | None = None) -> int:
    """Check a command line; one error and status 2, or what torchrun needs.

    That is the number of processes, and of OMP threads a process.
    """
    config = parse_args(argv)
    check(config)
    check_paths(training_paths(config), config)
    count = process_count(config, visible_gpus())
    check_world_size(config, count)
    print(count, thread_count(count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
