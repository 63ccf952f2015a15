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

from megatron_phf.config.inputs import (
    DataConfig,
    Fp8Config,
    ModelConfig,
    ParallelConfig,
    RecipeConfig,
    RolloutConfig,
    TokenizerConfig,
    VllmConfig,
    flag,
)


@dataclass(frozen=True)
class MethodConfig:
    phf_alpha: float = flag(0.05, "weight of the flow loss; 0 is OPSD alone")
    phf_window_size: int = flag(128, "positions a sequence in the flow loss")
    phf_window_rule: str = flag(
        "even",
        "choice of the positions: spread evenly, or (not the paper's) the first ones",
        ("even", "contiguous"),
    )
    phf_terms: str = flag(
        "direction,geometry,adjacent",
        "terms of the hidden-state loss, comma separated: direction, geometry, adjacent (PHF), "
        "pointwise, cka, or package.module:Class of your own; name=weight for another weight",
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
    opsd_beta: float = flag(0.0, "0: KL(teacher||student), 1: reverse, between: JSD")
    opsd_temperature: float = flag(1.1, "softmax temperature of both distributions")
    opsd_clip_mode: str = flag(
        "entry", "clamp each vocabulary entry, each token, or nothing", ("entry", "token", "none")
    )
    opsd_clip: float = flag(0.05, "the clamp's value")
    opsd_top_k: int = flag(0, "only the teacher's top-k entries; 0 is the full vocabulary")
    importance_ratio_cap: float | None = flag(
        None,
        "weigh each token's output loss by how much more probable the student makes it than what "
        "sampled it did, at most this (None: all alike)",
    )
    logits_chunk_tokens: int = flag(256, "tokens whose logits exist at the same time")
    teacher: str = flag("frozen", "the privileged teacher's weights", ("frozen", "ema", "live"))
    ema_decay: float = flag(0.999, "rho of the ema teacher")


@dataclass(frozen=True)
class TeacherConfig:
    """A teacher that is another model, and where a teacher's own weights are kept."""

    teacher_hf_model: str | None = flag(
        None, "frozen teacher from another model directory of the same vocabulary"
    )
    teacher_layer_map: str | None = flag(
        None, "its layer for each student layer, as 2,4,6,8 (default: by relative depth)"
    )
    teacher_num_layers_in_first_pipeline_stage: int | None = flag(
        None, "uneven split of the other model: first stage"
    )
    teacher_num_layers_in_last_pipeline_stage: int | None = flag(
        None, "uneven split of the other model: last stage"
    )
    teacher_offload: bool = flag(
        False, "a teacher's own weights stay in host memory between its passes"
    )


@dataclass(frozen=True)
class LoraConfig:
    lora_rank: int = flag(0, "train low-rank adapters of this rank alone; 0 trains all weights")
    lora_alpha: float = flag(128.0, "the adapters' output is scaled by this / --lora-rank")
    lora_dropout: float = flag(0.0, "of the adapters' input, in the student's training pass")
    lora_target_modules: str = flag(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "linears with an adapter, by their HuggingFace names",
    )
    lora_adapter: str | None = flag(None, "start from this PEFT adapter directory")
    save_adapter: str | None = flag(None, "export the trained adapters to this PEFT directory")


@dataclass(frozen=True)
class TrainConfig:
    train_iters: int = flag(100, "optimizer steps")
    global_batch_size: int = flag(32, "rollouts an optimizer step")
    micro_batch_size: int = flag(1, "rollouts a microbatch")
    lr: float = flag(5e-6, "peak learning rate")
    min_lr: float = flag(0.0, "final learning rate")
    lr_decay_style: str = flag(
        "cosine", "schedule", ("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = flag(
        None, "steps that the rate decays over (None: --train-iters, as a run began with it)"
    )
    lr_warmup_iters: int = flag(0, "linear warm-up steps")
    lr_warmup_fraction: float | None = flag(
        None, "warm-up as a fraction of --lr-decay-iters, in place of --lr-warmup-iters"
    )
    lr_wsd_decay_style: str = flag(
        "exponential",
        "how WSD (warm-up, stable, decay) ends",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = flag(None, "steps of that end, the last of --lr-decay-iters")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    adam_beta1: float = flag(0.9, "AdamW")
    adam_beta2: float = flag(0.999, "AdamW")
    adam_eps: float = flag(1e-8, "AdamW")
    clip_grad: float = flag(0.1, "global gradient norm at most; 0 is off")
    seed: int = flag(1234, "of the data order, the sampling and the initial weights")


@dataclass(frozen=True)
class EvaluationConfig:
    eval_data: str | None = flag(None, "JSONL of problems with answers to evaluate on")
    eval_interval: int = flag(
        0, "evaluate every so many steps; 0: before the first and after the last alone"
    )
    eval_samples: int = flag(12, "samples a problem (the k of Average@k)")
    eval_temperature: float = flag(1.0, "sampling temperature; 0 is greedy")
    eval_top_p: float = flag(0.95, "nucleus sampling")
    eval_top_k: int = flag(0, "top-k sampling; 0 is off")
    eval_max_new_tokens: int | None = flag(
        None, "tokens an answer at most (default: --max-new-tokens)"
    )
    eval_thinking: bool = flag(True, "the chat template in thinking mode")
    eval_seed: int = flag(0, "of the samples, the same in every run")
    grader: str = flag(
        "math",
        "math: equal as mathematics; exact: equal as text; or package.module:function of your own",
    )


@dataclass(frozen=True)
class BatchingConfig:
    max_tokens_per_microbatch: int = flag(
        0,
        "sort rollouts by length into microbatches of at most this many padded tokens of either "
        "model; 0: --micro-batch-size rollouts each",
    )
    pack_sequences: bool = flag(
        False,
        "with it: a microbatch's rollouts in one row (THD), without padding between them (with "
        "context parallelism, each padded to 2 x CP tokens)",
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = flag(None, "write checkpoints into this directory")
    load: str | None = flag(None, "resume from the newest checkpoint of this directory")
    save_interval: int = flag(0, "save every so many steps; 0: at the end alone")
    async_save: bool = flag(False, "train on while a checkpoint is written")
    keep_last: int = flag(0, "keep only so many checkpoints; 0 keeps all")
    exact_checkpoint: bool = flag(
        False, "refuse where --load would take an older checkpoint, or start without one"
    )
    exit_interval: int | None = flag(None, "save and end after a step that this divides")
    exit_duration_in_mins: float | None = flag(None, "save and end after so many minutes")
    max_consecutive_nonfinite_steps: int = flag(
        3, "steps in a row without a finite loss and gradient that end the run; fewer are skipped"
    )


@dataclass(frozen=True)
class OutputConfig:
    output_dir: str = flag("runs/train", "logs and everything else a run writes")
    run_name: str = flag("train", "what is tried; runs of one name differ in their seed alone")
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

    demo_seeds: int = flag(3, "embedded task: seeds of each method")
    warm_start_iters: int = flag(800, "embedded task: supervised steps before, at most")
    warm_start_loss: float = flag(0.03, "embedded task: they end at this mean loss, nats a token")
    warm_start_lr: float = flag(1e-3, "embedded task: their peak learning rate")
    eval_problems: int = flag(60, "embedded task: held-out problems")


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
