"""Every setting of a run, as frozen dataclasses.

A field ``tensor_model_parallel_size`` is the flag ``--tensor-model-parallel-size`` (see
:mod:`megatron_phf.flags`).  Defaults are this project's: a frozen teacher, all weights trained, and
PHF's numbers otherwise.  The published recipes are presets (:mod:`megatron_phf.presets`).  No
import of torch here: the checks before launch answer at once.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any


def _flag(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RecipeConfig:
    preset: str | None = _flag(
        None,
        "start from a published recipe (docs/recipes.md): phf, phf_8b, phf_as_written, opsd, "
        "opsd_8b or opsd_first; any other flag wins, wherever it stands",
    )


@dataclass(frozen=True)
class ModelConfig:
    hf_model: str | None = _flag(
        None, "HuggingFace model directory (Qwen3, Qwen3-MoE, Qwen2, Llama)"
    )
    trust_remote_code: bool = _flag(False, "run Python code that comes with the tokenizer")
    dtype: str = _flag("auto", "auto: bf16 on CUDA, fp32 on CPU", ("auto", "fp32", "bf16"))
    transformer_impl: str = _flag(
        "auto",
        "layer spec; auto: Transformer Engine on CUDA where installed, else local",
        ("auto", "local", "transformer_engine"),
    )
    make_vocab_size_divisible_by: int = _flag(128, "pad the vocabulary to this x TP size")
    pad_attention_heads: bool = _flag(
        False, "add exact zero heads where the model's do not divide by the TP size"
    )
    moe_aux_loss_coeff: float | None = _flag(
        None, "weight of the routers' load-balancing loss (None: the model's own; 0 is off)"
    )


@dataclass(frozen=True)
class Fp8Config:
    """FP8 in the student's training pass, with Transformer Engine's layers (docs/gpu.md)."""

    fp8_format: str | None = _flag(
        None, "hybrid: E4M3 forward, E5M2 backward; e4m3: both", ("hybrid", "e4m3")
    )
    fp8_recipe: str = _flag(
        "delayed",
        "where scales come from; mxfp8 needs Blackwell",
        ("delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_amax_history_len: int = _flag(1, "of delayed scaling")
    fp8_amax_compute_algo: str = _flag("most_recent", "of delayed scaling", ("most_recent", "max"))
    fp8_param_gather: bool = _flag(False, "keep and gather the linears' weights in FP8")
    first_last_layers_bf16: bool = _flag(False, "first and last layers in bf16")
    num_layers_at_start_in_bf16: int = _flag(1, "with --first-last-layers-bf16")
    num_layers_at_end_in_bf16: int = _flag(1, "with --first-last-layers-bf16")


@dataclass(frozen=True)
class TokenizerConfig:
    tokenizer_type: str = _flag(
        "HFTokenizer", "kind of tokenizer", ("HFTokenizer", "SentencePieceTokenizer")
    )
    tokenizer_model: str | None = _flag(
        None, "HuggingFace directory, or SentencePiece file; without it --hf-model's tokenizer"
    )


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = _flag(1, "tensor parallel size")
    pipeline_model_parallel_size: int = _flag(1, "pipeline parallel size")
    num_virtual_stages_per_pipeline_rank: int = _flag(1, "virtual (interleaved) stages")
    context_parallel_size: int = _flag(1, "context parallel size: shard sequences")
    expert_model_parallel_size: int = _flag(1, "expert parallel size, within data parallelism")
    sequence_parallel: bool = _flag(False, "shard activations along the sequence over TP")
    use_distributed_optimizer: bool = _flag(False, "shard the optimizer state over DP")
    overlap_grad_reduce: bool = _flag(
        False, "reduce gradients over DP while the backward pass goes on"
    )
    overlap_param_gather: bool = _flag(
        False, "gather updated weights over DP until something reads them"
    )
    tp_comm_overlap: bool = _flag(
        False, "overlap TP's communication with GEMMs in the student's training pass"
    )
    gradient_accumulation_fusion: bool = _flag(
        True, "add weight gradients in the GEMM (on CUDA, with NVIDIA's apex)"
    )
    num_layers_in_first_pipeline_stage: int | None = _flag(None, "uneven split: first stage")
    num_layers_in_last_pipeline_stage: int | None = _flag(None, "uneven split: last stage")
    account_for_embedding_in_pipeline_split: bool = _flag(
        False, "the embedding takes a layer's place in the split over stages"
    )
    account_for_loss_in_pipeline_split: bool = _flag(False, "so does the output head")
    recompute_granularity: str | None = _flag(None, "activation recompute", ("full", "selective"))
    recompute_method: str = _flag("uniform", "of full recompute", ("uniform", "block"))
    recompute_num_layers: int = _flag(1, "of full recompute")
    distributed_timeout_minutes: float = _flag(10.0, "a collective that waits longer fails")


@dataclass(frozen=True)
class DataConfig:
    data: str | None = _flag(None, "JSONL of problems with reference solutions")
    problem_field: str = _flag("problem", "name of the problem's field")
    solution_field: str = _flag("solution", "name of the solution's field")
    answer_field: str = _flag("answer", "name of the optional answer's field")
    student_template: str | None = _flag(None, "file with the student's prompt ({problem})")
    teacher_template: str | None = _flag(
        None, "file with the teacher's prompt ({problem}, {solution})"
    )
    student_thinking: bool = _flag(False, "the student's chat template in thinking mode")
    teacher_thinking: bool = _flag(True, "the teacher's chat template in thinking mode")
    max_prompt_length: int = _flag(512, "student prompt, tokens")
    max_teacher_prompt_length: int = _flag(2048, "teacher prompt, tokens")
    overlong_prompts: str = _flag("drop", "drop (counted) or fail", ("drop", "error"))


@dataclass(frozen=True)
class RolloutConfig:
    rollout_engine: str = _flag(
        "megatron",
        "megatron, vllm, replay or reference; or package.module:factory of your own "
        "(docs/engines.md)",
    )
    replay_file: str | None = _flag(None, "recorded rollouts for --rollout-engine replay")
    record_rollouts: str | None = _flag(None, "write every rollout to this replay file")
    max_new_tokens: int = _flag(
        1024, "tokens a rollout at most (fewer where the model's positions end)"
    )
    rollout_temperature: float = _flag(1.1, "sampling temperature; 0 is greedy")
    rollout_top_p: float = _flag(0.95, "nucleus sampling")
    rollout_top_k: int = _flag(20, "top-k sampling; 0 is off")
    rollout_batch_size: int = _flag(64, "sequences generated at once on a data-parallel rank")


@dataclass(frozen=True)
class VllmConfig:
    """Only read with --rollout-engine vllm (docs/vllm.md)."""

    vllm_url: str | None = _flag(
        None, "vLLM server(s) for --rollout-engine vllm, as http://127.0.0.1:8000[,...]"
    )
    vllm_api_key_file: str | None = _flag(None, "file with the servers' --api-key")
    vllm_weight_sync: str = _flag(
        "auto",
        "how the student's weights reach the servers; auto: adapter with --lora-rank",
        ("auto", "adapter", "checkpoint"),
    )
    vllm_sync_interval: int = _flag(1, "sync the weights every so many steps")
    vllm_sync_dir: str | None = _flag(
        None, "directory that servers read weights from (default: vllm under --output-dir)"
    )
    vllm_concurrency: int = _flag(64, "requests at once of a data-parallel rank")
    vllm_timeout_seconds: float = _flag(300.0, "a request without its answer fails")
    vllm_max_retries: int = _flag(8, "of a request that fails, before the run ends")
    vllm_backoff_seconds: float = _flag(1.0, "wait before the first retry; doubles up to 60")
    vllm_drift_warning: float = _flag(
        0.05, "warn where sampled tokens' log-probabilities differ more on average, nats"
    )


@dataclass(frozen=True)
class MethodConfig:
    phf_alpha: float = _flag(0.05, "weight of the flow loss; 0 is OPSD alone")
    phf_window_size: int = _flag(128, "positions a sequence in the flow loss")
    phf_window_rule: str = _flag(
        "even",
        "choice of the positions: spread evenly, or (not the paper's) the first ones",
        ("even", "contiguous"),
    )
    phf_terms: str = _flag(
        "direction,geometry,adjacent",
        "terms of the hidden-state loss, comma separated: direction, geometry, adjacent (PHF), "
        "pointwise, cka, or package.module:Class of your own; name=weight for another weight",
    )
    phf_layers: str | None = _flag(
        None, "layers of the flow loss from 1 on, as 2,4,6 (the paper: all)"
    )
    opsd_objective: str = _flag(
        "jsd",
        "output loss; cross_entropy ignores the teacher (with --rollout-engine reference: "
        "supervised fine-tuning)",
        ("jsd", "policy_gradient", "cross_entropy"),
    )
    opsd_beta: float = _flag(0.0, "0: KL(teacher||student), 1: reverse, between: JSD")
    opsd_temperature: float = _flag(1.1, "softmax temperature of both distributions")
    opsd_clip_mode: str = _flag(
        "entry", "clamp each vocabulary entry, each token, or nothing", ("entry", "token", "none")
    )
    opsd_clip: float = _flag(0.05, "the clamp's value")
    opsd_top_k: int = _flag(0, "only the teacher's top-k entries; 0 is the full vocabulary")
    logits_chunk_tokens: int = _flag(256, "tokens whose logits exist at the same time")
    teacher: str = _flag("frozen", "the privileged teacher's weights", ("frozen", "ema", "live"))
    ema_decay: float = _flag(0.999, "rho of the ema teacher")


@dataclass(frozen=True)
class TeacherConfig:
    """A teacher that is another model, and where a teacher's own weights are kept."""

    teacher_hf_model: str | None = _flag(
        None, "frozen teacher from another model directory of the same vocabulary"
    )
    teacher_layer_map: str | None = _flag(
        None, "its layer for each student layer, as 2,4,6,8 (default: by relative depth)"
    )
    teacher_num_layers_in_first_pipeline_stage: int | None = _flag(
        None, "uneven split of the other model: first stage"
    )
    teacher_num_layers_in_last_pipeline_stage: int | None = _flag(
        None, "uneven split of the other model: last stage"
    )
    teacher_offload: bool = _flag(
        False, "a teacher's own weights stay in host memory between its passes"
    )


@dataclass(frozen=True)
class LoraConfig:
    lora_rank: int = _flag(0, "train low-rank adapters of this rank alone; 0 trains all weights")
    lora_alpha: float = _flag(128.0, "the adapters' output is scaled by this / --lora-rank")
    lora_dropout: float = _flag(0.0, "of the adapters' input, in the student's training pass")
    lora_target_modules: str = _flag(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "linears with an adapter, by their HuggingFace names",
    )
    lora_adapter: str | None = _flag(None, "start from this PEFT adapter directory")
    save_adapter: str | None = _flag(None, "export the trained adapters to this PEFT directory")


@dataclass(frozen=True)
class TrainConfig:
    train_iters: int = _flag(100, "optimizer steps")
    global_batch_size: int = _flag(32, "rollouts an optimizer step")
    micro_batch_size: int = _flag(1, "rollouts a microbatch")
    lr: float = _flag(5e-6, "peak learning rate")
    min_lr: float = _flag(0.0, "final learning rate")
    lr_decay_style: str = _flag(
        "cosine", "schedule", ("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = _flag(
        None, "steps that the rate decays over (None: --train-iters, as a run began with it)"
    )
    lr_warmup_iters: int = _flag(0, "linear warm-up steps")
    lr_warmup_fraction: float | None = _flag(
        None, "warm-up as a fraction of --lr-decay-iters, in place of --lr-warmup-iters"
    )
    lr_wsd_decay_style: str = _flag(
        "exponential",
        "how WSD (warm-up, stable, decay) ends",
        ("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = _flag(None, "steps of that end, the last of --lr-decay-iters")
    weight_decay: float = _flag(0.0, "AdamW weight decay")
    adam_beta1: float = _flag(0.9, "AdamW")
    adam_beta2: float = _flag(0.999, "AdamW")
    adam_eps: float = _flag(1e-8, "AdamW")
    clip_grad: float = _flag(0.1, "global gradient norm at most; 0 is off")
    seed: int = _flag(1234, "of the data order, the sampling and the initial weights")


@dataclass(frozen=True)
class EvaluationConfig:
    eval_data: str | None = _flag(None, "JSONL of problems with answers to evaluate on")
    eval_interval: int = _flag(
        0, "evaluate every so many steps; 0: before the first and after the last alone"
    )
    eval_samples: int = _flag(12, "samples a problem (the k of Average@k)")
    eval_temperature: float = _flag(1.0, "sampling temperature; 0 is greedy")
    eval_top_p: float = _flag(0.95, "nucleus sampling")
    eval_top_k: int = _flag(0, "top-k sampling; 0 is off")
    eval_max_new_tokens: int | None = _flag(
        None, "tokens an answer at most (default: --max-new-tokens)"
    )
    eval_thinking: bool = _flag(True, "the chat template in thinking mode")
    eval_seed: int = _flag(0, "of the samples, the same in every run")
    grader: str = _flag(
        "math",
        "math: equal as mathematics; exact: equal as text; or package.module:function of your own",
    )


@dataclass(frozen=True)
class BatchingConfig:
    max_tokens_per_microbatch: int = _flag(
        0,
        "sort rollouts by length into microbatches of at most this many padded tokens of either "
        "model; 0: --micro-batch-size rollouts each",
    )
    pack_sequences: bool = _flag(
        False,
        "with it: a microbatch's rollouts in one row (THD), without padding between them (with "
        "context parallelism, each padded to 2 x CP tokens)",
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = _flag(None, "write checkpoints into this directory")
    load: str | None = _flag(None, "resume from the newest checkpoint of this directory")
    save_interval: int = _flag(0, "save every so many steps; 0: at the end alone")
    async_save: bool = _flag(False, "train on while a checkpoint is written")
    keep_last: int = _flag(0, "keep only so many checkpoints; 0 keeps all")
    exact_checkpoint: bool = _flag(
        False, "refuse where --load would take an older checkpoint, or start without one"
    )
    exit_interval: int | None = _flag(None, "save and end after a step that this divides")
    exit_duration_in_mins: float | None = _flag(None, "save and end after so many minutes")
    max_consecutive_nonfinite_steps: int = _flag(
        3, "steps in a row without a finite loss and gradient that end the run; fewer are skipped"
    )


@dataclass(frozen=True)
class OutputConfig:
    output_dir: str = _flag("runs/train", "logs and everything else a run writes")
    run_name: str = _flag("train", "what is tried; runs of one name differ in their seed alone")
    metrics_file: str | None = _flag(
        None, "one JSON object a step (default: metrics.jsonl in --output-dir)"
    )
    tensorboard: bool = _flag(True, "event files under --output-dir/tensorboard")
    wandb_project: str | None = _flag(None, "log to this Weights & Biases project")
    save_hf: str | None = _flag(None, "export the trained student to this HuggingFace directory")
    progress: bool = _flag(True, "a progress bar on rank 0")
    record_memory_history: bool = _flag(
        False, "note where device memory is allocated, for the snapshot of an out-of-memory error"
    )


@dataclass(frozen=True)
class EmbeddedConfig:
    """Only read by the embedded default (neither --hf-model nor --data)."""

    demo_seeds: int = _flag(3, "embedded task: seeds of each method")
    warm_start_iters: int = _flag(800, "embedded task: supervised steps before, at most")
    warm_start_loss: float = _flag(0.03, "embedded task: they end at this mean loss, nats a token")
    warm_start_lr: float = _flag(1e-3, "embedded task: their peak learning rate")
    eval_problems: int = _flag(60, "embedded task: held-out problems")


@dataclass(frozen=True)
class Config:
    recipe: RecipeConfig = RecipeConfig()
    model: ModelConfig = ModelConfig()
    fp8: Fp8Config = Fp8Config()
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    method: MethodConfig = MethodConfig()
    teacher: TeacherConfig = TeacherConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    batching: BatchingConfig = BatchingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig = OutputConfig()
    embedded: EmbeddedConfig = EmbeddedConfig()

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
