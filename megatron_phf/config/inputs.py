"""Settings of what a run starts from: recipe, model, layout, data, rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.field import (
    ABOVE_0,
    ABOVE_0_TO_1,
    at_least,
    flag,
)


@dataclass(frozen=True)
class RecipeConfig:
    preset: str | None = flag(
        None,
        "start from a published recipe (docs/recipes.md): phf, phf_8b, phf_as_written, opsd, "
        "opsd_8b or opsd_first; any other flag wins, wherever it stands",
    )


@dataclass(frozen=True)
class ModelConfig:
    hf_model: str | None = flag(
        None, "HuggingFace model directory (Qwen3, Qwen3-MoE, Qwen2, Llama)"
    )
    trust_remote_code: bool = flag(False, "run Python code that comes with the tokenizer")
    dtype: str = flag("auto", "auto: bf16 on CUDA, fp32 on CPU", ("auto", "fp32", "bf16"))
    transformer_impl: str = flag(
        "auto",
        "layer spec; auto: Transformer Engine on CUDA where installed, else local",
        ("auto", "local", "transformer_engine"),
    )
    make_vocab_size_divisible_by: int = flag(
        128, "pad the vocabulary to this x TP size", at_least(1)
    )
    pad_attention_heads: bool = flag(
        False, "add exact zero heads where the model's do not divide by the TP size"
    )
    moe_aux_loss_coeff: float | None = flag(
        None,
        "weight of the routers' load-balancing loss (None: the model's own; 0 is off)",
        at_least(0),
    )


@dataclass(frozen=True)
class Fp8Config:
    """FP8 in the student's training pass, with Transformer Engine's layers (docs/gpu.md)."""

    fp8_format: str | None = flag(
        None, "hybrid: E4M3 forward, E5M2 backward; e4m3: both", ("hybrid", "e4m3")
    )
    fp8_recipe: str = flag(
        "delayed",
        "where scales come from; mxfp8 needs Blackwell",
        ("delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_amax_history_len: int = flag(1, "of delayed scaling", at_least(1))
    fp8_amax_compute_algo: str = flag("most_recent", "of delayed scaling", ("most_recent", "max"))
    fp8_param_gather: bool = flag(
        False, "keep and gather the linears' weights in FP8", needs="fp8_format"
    )
    first_last_layers_bf16: bool = flag(False, "first and last layers in bf16", needs="fp8_format")
    num_layers_at_start_in_bf16: int = flag(1, "with --first-last-layers-bf16", at_least(0))
    num_layers_at_end_in_bf16: int = flag(1, "with --first-last-layers-bf16", at_least(0))


@dataclass(frozen=True)
class TokenizerConfig:
    tokenizer_type: str = flag(
        "HFTokenizer", "kind of tokenizer", ("HFTokenizer", "SentencePieceTokenizer")
    )
    tokenizer_model: str | None = flag(
        None,
        "HuggingFace directory, or SentencePiece file; without it --hf-model's tokenizer",
        needs="hf_model",
    )


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = flag(1, "tensor parallel size", at_least(1))
    pipeline_model_parallel_size: int = flag(1, "pipeline parallel size", at_least(1))
    num_virtual_stages_per_pipeline_rank: int = flag(1, "virtual (interleaved) stages", at_least(1))
    context_parallel_size: int = flag(1, "context parallel size: shard sequences", at_least(1))
    expert_model_parallel_size: int = flag(
        1, "expert parallel size, within data parallelism", at_least(1)
    )
    expert_tensor_parallel_size: int | None = flag(
        None,
        "ranks that share out one expert's channels (default: as tensor parallelism)",
        at_least(1),
    )
    sequence_parallel: bool = flag(False, "shard activations along the sequence over TP")
    use_distributed_optimizer: bool = flag(False, "shard the optimizer state over DP")
    overlap_grad_reduce: bool = flag(
        False, "reduce gradients over DP while the backward pass goes on"
    )
    overlap_param_gather: bool = flag(
        False, "gather updated weights over DP until something reads them"
    )
    tp_comm_overlap: bool = flag(
        False, "overlap TP's communication with GEMMs in the student's training pass"
    )
    gradient_accumulation_fusion: bool = flag(
        True, "add weight gradients in the GEMM (on CUDA, with NVIDIA's apex)"
    )
    num_layers_in_first_pipeline_stage: int | None = flag(
        None, "uneven split: first stage", at_least(1)
    )
    num_layers_in_last_pipeline_stage: int | None = flag(
        None, "uneven split: last stage", at_least(1)
    )
    account_for_embedding_in_pipeline_split: bool = flag(
        False, "the embedding takes a layer's place in the split over stages"
    )
    account_for_loss_in_pipeline_split: bool = flag(False, "so does the output head")
    recompute_granularity: str | None = flag(None, "activation recompute", ("full", "selective"))
    recompute_method: str = flag(
        "uniform",
        "of full recompute",
        ("uniform", "block"),
        acts_with="recompute_granularity=full",
    )
    recompute_num_layers: int = flag(
        1, "of full recompute", at_least(1), acts_with="recompute_granularity=full"
    )
    distributed_timeout_minutes: float = flag(10.0, "a collective that waits longer fails", ABOVE_0)

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share out one expert's channels."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(frozen=True)
class DataConfig:
    data: str | None = flag(None, "JSONL of problems with reference solutions")
    problem_field: str = flag("problem", "name of the problem's field")
    solution_field: str = flag("solution", "name of the solution's field")
    answer_field: str = flag("answer", "name of the optional answer's field")
    student_template: str | None = flag(None, "file with the student's prompt ({problem})")
    teacher_template: str | None = flag(
        None, "file with the teacher's prompt ({problem}, {solution})"
    )
    privileged: str = flag(
        "solution",
        "what the teacher is shown: solution, answer, hint:FRACTION (hint:0.2-1 changes over the "
        "run), none; controls: other_problem, wrong",
    )
    student_thinking: bool = flag(False, "the student's chat template in thinking mode")
    teacher_thinking: bool = flag(True, "the teacher's chat template in thinking mode")
    max_prompt_length: int = flag(512, "student prompt, tokens", at_least(1))
    max_teacher_prompt_length: int = flag(2048, "teacher prompt, tokens", at_least(1))
    overlong_prompts: str = flag("drop", "drop (counted) or fail", ("drop", "error"))


@dataclass(frozen=True)
class RolloutConfig:
    rollout_engine: str = flag(
        "megatron",
        "megatron, vllm, replay or reference; or package.module:factory of your own "
        "(docs/engines.md)",
    )
    replay_file: str | None = flag(None, "recorded rollouts for --rollout-engine replay")
    record_rollouts: str | None = flag(None, "write every rollout to this replay file")
    max_new_tokens: int = flag(
        1024, "tokens a rollout at most (fewer where the model's positions end)", at_least(1)
    )
    rollout_temperature: float = flag(1.1, "sampling temperature; 0 is greedy", at_least(0))
    rollout_top_p: float = flag(0.95, "nucleus sampling", ABOVE_0_TO_1)
    rollout_top_k: int = flag(20, "top-k sampling; 0 is off", at_least(0))
    engine_drift_warning: float = flag(
        0.05,
        "warn where the engine's log-probabilities of its tokens and the student's differ more on "
        "average, nats",
        ABOVE_0,
        alias="vllm_drift_warning",
    )
    rollout_batch_size: int = flag(
        64, "sequences generated at once on a data-parallel rank", at_least(1)
    )
    max_off_policy_steps: int = flag(
        0,
        "let a served engine sample the next so many steps' rollouts while a step trains, by "
        "weights of at most so many steps before; 0: none (docs/engines.md)",
        at_least(0),
    )
    rollouts_per_problem: int = flag(
        1, "rollouts of each problem, of --global-batch-size in all", at_least(1)
    )
    keep_rollouts: str = flag(
        "all",
        "train on all rollouts, or on those alone whose answers --grader calls so",
        ("all", "correct", "incorrect"),
    )
    decode_cuda_graphs: str = flag(
        "auto",
        "launch each token's step as a CUDA graph; auto: where it can be captured",
        ("auto", "on", "off"),
    )


@dataclass(frozen=True)
class VllmConfig:
    """Only read with --rollout-engine vllm (docs/vllm.md)."""

    vllm_url: str | None = flag(
        None, "vLLM server(s) for --rollout-engine vllm, as http://127.0.0.1:8000[,...]"
    )
    vllm_launch: str | None = flag(
        None,
        "start a server on this machine that ends with the run, by these flags of vllm serve, "
        "variables first: --vllm-launch='CUDA_VISIBLE_DEVICES=4,5 --tensor-parallel-size 2'",
    )
    vllm_api_key_file: str | None = flag(None, "file with the servers' --api-key")
    vllm_weight_sync: str = flag(
        "auto",
        "how the student's weights reach the servers; auto: adapter with --lora-rank, else "
        "checkpoint; torch_distributed, nccl (servers on other GPUs), ipc (on the same): without "
        "files, the backend of the servers' --weight-transfer-config",
        ("auto", "adapter", "checkpoint", "torch_distributed", "nccl", "ipc"),
    )
    vllm_sync_interval: int = flag(1, "sync the weights every so many steps", at_least(1))
    vllm_sync_dir: str | None = flag(
        None, "directory that servers read weights from (default: vllm under --output-dir)"
    )
    vllm_colocated: bool = flag(
        False, "the servers are on the training GPUs: asleep but while rollouts are sampled"
    )
    vllm_concurrency: int = flag(64, "requests at once of a data-parallel rank", at_least(1))
    vllm_timeout_seconds: float = flag(300.0, "a request without its answer fails", ABOVE_0)
    vllm_max_retries: int = flag(8, "of a request that fails, before the run ends", at_least(0))
    vllm_backoff_seconds: float = flag(
        1.0, "wait before the first retry; doubles up to 60", ABOVE_0
    )
