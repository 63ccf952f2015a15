"""Every setting of a run, as frozen dataclasses.

A field ``tensor_model_parallel_size`` is the flag ``--tensor-model-parallel-size`` (see
:mod:`.flags`).  Defaults are this project's: a frozen teacher, all weights trained, and PHF's
numbers otherwise.  The published recipes are presets (:mod:`.presets`).  No import of torch here:
the checks before launch answer at once.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from megatron_phf.config.field import (
    ABOVE_0,
    ABOVE_0_TO_1,
    FROM_0_TO_1,
    NAME,
    SEED,
    at_least,
    flag,
)
from megatron_phf.config.inputs import (
    DataConfig,
    Fp8Config,
    ModelConfig,
    ParallelConfig,
    RecipeConfig,
    RolloutConfig,
    TokenizerConfig,
    VllmConfig,
)
from megatron_phf.config.training import BatchingConfig, CollapseConfig, LoraConfig, TrainConfig


@dataclass(frozen=True)
class MethodConfig:
    phf_alpha: float = flag(0.05, "weight of the flow loss; 0 is OPSD alone", at_least(0))
    phf_window_size: int = flag(128, "positions a sequence in the flow loss", at_least(2))
    phf_window_rule: str = flag(
        "even",
        "choice of the positions: spread evenly, or (not the paper's) the first ones",
        ("even", "contiguous"),
    )
    phf_terms: str = flag(
        "direction,geometry,adjacent",
        "terms of the hidden-state loss, comma separated: direction, geometry, adjacent (PHF), "
        "pointwise, mse, nmse, cka, cka_adjacent, last_layer, or package.module:Class of your own; "
        "name=weight for another weight",
    )
    phf_layers: str | None = flag(
        None, "layers of the flow loss from 1 on, as 2,4,6 (the paper: all)"
    )
    opsd_objective: str = flag(
        "jsd",
        "output loss; cross_entropy ignores the teacher (with --rollout-engine reference: "
        "supervised fine-tuning)",
        ("jsd", "policy_gradient", "cross_entropy"),
    )
    opsd_weight: float = flag(
        1.0, "weight of the output loss; 0 trains on hidden states alone (OPRD)", at_least(0)
    )
    opsd_beta: float = flag(0.0, "0: KL(teacher||student), 1: reverse, between: JSD", FROM_0_TO_1)
    opsd_temperature: float = flag(1.1, "softmax temperature of both distributions", ABOVE_0)
    opsd_clip_mode: str = flag(
        "entry", "clamp each vocabulary entry, each token, or nothing", ("entry", "token", "none")
    )
    opsd_clip: float = flag(0.05, "the clamp's value", ABOVE_0)
    opsd_top_k: int = flag(
        0, "only the teacher's top-k entries; 0 is the full vocabulary", at_least(0)
    )
    importance_ratio_cap: float | None = flag(
        None,
        "weigh each token's output loss by how much more probable the student makes it than what "
        "sampled it did, at most this (None: all alike)",
        ABOVE_0,
    )
    token_weighting: str = flag(
        "none",
        "what each response token counts in both losses: twice where the teacher's entropy is high "
        "(EOPD), the student's most uncertain ones alone (TIP), later ones more (PW-OPSD), those "
        "of greatest divergence alone (TIP)",
        ("none", "teacher_entropy", "student_entropy", "position", "divergence_top_p"),
    )
    token_keep_fraction: float = flag(
        0.5,
        "share of a response's tokens that student_entropy and divergence_top_p keep",
        ABOVE_0_TO_1,
    )
    token_entropy_threshold: float = flag(
        0.8, "nats above which a token counts twice with teacher_entropy", at_least(0)
    )
    skip_first_tokens: int = flag(
        0,
        "tokens at the start of each response that are in no loss (a fixed <think> line)",
        at_least(0),
    )
    logits_chunk_tokens: int = flag(256, "tokens whose logits exist at the same time", at_least(1))
    teacher: str = flag("frozen", "the privileged teacher's weights", ("frozen", "ema", "live"))
    ema_decay: float = flag(0.999, "rho of the ema teacher", FROM_0_TO_1)


@dataclass(frozen=True)
class TeacherConfig:
    """A teacher that is another model, and where a teacher's own weights are kept."""

    teacher_hf_model: str | None = flag(
        None,
        "frozen teacher from another model directory of the same vocabulary; NAME=DIR, once for "
        "each of several of one architecture: a problem's 'teacher' says whose it is",
        needs="hf_model",
        named=True,
    )
    teacher_layer_map: str | None = flag(
        None,
        "its layer for each student layer, as 2,4,6,8 (default: by relative depth)",
        needs="teacher_hf_model",
    )
    teacher_num_layers_in_first_pipeline_stage: int | None = flag(
        None, "uneven split of the other model: first stage", at_least(1), needs="teacher_hf_model"
    )
    teacher_num_layers_in_last_pipeline_stage: int | None = flag(
        None, "uneven split of the other model: last stage", at_least(1), needs="teacher_hf_model"
    )
    teacher_offload: bool = flag(
        False, "a teacher's own weights stay in host memory between its passes"
    )


@dataclass(frozen=True)
class EvaluationConfig:
    eval_data: str | None = flag(
        None, "JSONL of problems with answers to evaluate on", needs="hf_model"
    )
    eval_interval: int = flag(
        0,
        "evaluate every so many steps; 0: before the first and after the last alone",
        at_least(0),
        needs="eval_data",
    )
    eval_samples: int = flag(12, "samples a problem (the k of Average@k)", at_least(1))
    eval_temperature: float = flag(1.0, "sampling temperature; 0 is greedy", at_least(0))
    eval_top_p: float = flag(0.95, "nucleus sampling", ABOVE_0_TO_1)
    eval_top_k: int = flag(0, "top-k sampling; 0 is off", at_least(0))
    eval_max_new_tokens: int | None = flag(
        None, "tokens an answer at most (default: --max-new-tokens)", at_least(1)
    )
    eval_thinking: bool = flag(True, "the chat template in thinking mode")
    eval_seed: int = flag(0, "of the samples, the same in every run", SEED)
    grader: str = flag(
        "math",
        "math: equal as mathematics; exact: equal as text; or package.module:function of your own",
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = flag(None, "write checkpoints into this directory", needs="hf_model")
    load: str | None = flag(
        None, "resume from the newest checkpoint of this directory", needs="hf_model"
    )
    save_interval: int = flag(
        0, "save every so many steps; 0: at the end alone", at_least(0), needs="save"
    )
    async_save: bool = flag(False, "train on while a checkpoint is written", needs="save")
    keep_last: int = flag(
        0, "keep only so many checkpoints; 0 keeps all", at_least(0), needs="save"
    )
    exact_checkpoint: bool = flag(
        False,
        "refuse where --load would take an older checkpoint, or start without one",
        needs="load",
    )
    exit_interval: int | None = flag(
        None, "save and end after a step that this divides", at_least(1)
    )
    exit_duration_in_mins: float | None = flag(None, "save and end after so many minutes", ABOVE_0)
    max_consecutive_nonfinite_steps: int = flag(
        3,
        "steps in a row without a finite loss and gradient that end the run; fewer are skipped",
        at_least(1),
    )


@dataclass(frozen=True)
class OutputConfig:
    output_dir: str = flag("runs/train", "logs and everything else a run writes")
    run_name: str = flag(
        "train", "what is tried; runs of one name differ in their seed alone", NAME
    )
    metrics_file: str | None = flag(
        None, "one JSON object a step (default: metrics.jsonl in --output-dir)"
    )
    tensorboard: bool = flag(True, "event files under --output-dir/tensorboard")
    wandb_project: str | None = flag(None, "log to this Weights & Biases project")
    save_hf: str | None = flag(None, "export the trained student to this HuggingFace directory")
    progress: bool = flag(True, "a progress bar on rank 0")
    record_memory_history: bool = flag(
        False, "note where device memory is allocated, for the snapshot of an out-of-memory error"
    )


@dataclass(frozen=True)
class EmbeddedConfig:
    """Only read by the embedded default (neither --hf-model nor --data)."""

    demo_seeds: int = flag(3, "embedded task: seeds of each method", at_least(1))
    warm_start_iters: int = flag(
        800, "embedded task: supervised steps before, at most", at_least(0)
    )
    warm_start_loss: float = flag(
        0.03, "embedded task: they end at this mean loss, nats a token", at_least(0)
    )
    warm_start_lr: float = flag(1e-3, "embedded task: their peak learning rate", at_least(0))
    eval_problems: int = flag(60, "embedded task: held-out problems", at_least(1))


@dataclass(frozen=True)
class Config:
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    embedded: EmbeddedConfig = field(default_factory=EmbeddedConfig)

    @property
    def is_embedded(self) -> bool:
        """Whether the run uses the embedded task and model."""
        return self.model.hf_model is None and self.data.data is None

    def replaced(self, **values: Any) -> Config:
        """This configuration with some fields, named without their group, set anew."""
        return _assign(self, values)


def config_groups() -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in dataclasses.fields(Config)}


def _assign(config: Config, values: dict[str, Any]) -> Config:
    for group, cls in config_groups().items():
        names = {f.name for f in dataclasses.fields(cls)} & values.keys()
        changed = {name: values[name] for name in names}
        config = dataclasses.replace(
            config, **{group: dataclasses.replace(getattr(config, group), **changed)}
        )
    return config


def flag_of(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")
