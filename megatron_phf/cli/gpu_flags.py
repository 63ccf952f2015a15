"""Flags of Transformer Engine, FP8 and overlap: what does not fit is refused before launch.

Without torch, unless the flags ask for Transformer Engine and it is there: then it is imported.
"""

from __future__ import annotations

from megatron_phf.config.settings import Config, flag_of
from megatron_phf.data.microbatches import round_up
from megatron_phf.model.architecture import Architecture
from megatron_phf.rollout.engines import reads_data
from megatron_phf.runtime.optional_packages import why_missing
from megatron_phf.teacher.traits import traits_of


def _needs_engine(config: Config) -> None:
    implementation, fp8 = config.model.transformer_impl, config.fp8.fp8_format is not None
    if implementation != "transformer_engine" and not fp8:
        return
    if implementation == "local":
        raise ValueError(
            "--fp8-format needs Transformer Engine's layers: leave out --transformer-impl local"
        )
    problem = why_missing("transformer_engine")
    if problem is not None:
        flag = "--fp8-format" if fp8 else "--transformer-impl transformer_engine"
        raise ValueError(
            f"{flag} needs Transformer Engine's layers: {problem}; pip install "
            "--no-build-isolation 'transformer_engine[pytorch]', or leave the flag out"
        )
    if not fp8:
        return
    if config.model.dtype == "fp32":
        raise ValueError("--fp8-format needs --dtype bf16")


def _check_fp8_options(config: Config) -> None:
    fp8 = config.fp8
    if fp8.first_last_layers_bf16 and fp8.fp8_recipe == "delayed":
        raise ValueError(
            "--first-last-layers-bf16 does not work with --fp8-recipe delayed, whose scales are "
            "updated once for all layers; choose tensorwise, blockwise or mxfp8"
        )
    if fp8.fp8_recipe == "blockwise" and fp8.fp8_format == "hybrid":
        raise ValueError("--fp8-recipe blockwise has no E5M2; use --fp8-format e4m3")
    if fp8.fp8_param_gather:
        _check_fp8_weights(config)


def _check_fp8_weights(config: Config) -> None:
    if not config.parallel.use_distributed_optimizer:
        raise ValueError(
            "--fp8-param-gather needs --use-distributed-optimizer, which keeps the fp32 weights"
        )
    if config.fp8.fp8_recipe == "mxfp8":
        raise ValueError("--fp8-param-gather does not work with --fp8-recipe mxfp8; leave it out")
    if config.lora.lora_rank:
        raise ValueError("--fp8-param-gather is for training all weights; leave out --lora-rank")
    if not traits_of(config).copy:
        raise ValueError(
            f"--fp8-param-gather: a --teacher {config.method.teacher} reads the student's weights, "
            "which must be bf16; use frozen or ema"
        )


def check_fp8_model(config: Config, arch: Architecture) -> None:
    """Raise ValueError where the model has widths or layers that FP8 cannot take."""
    fp8, tp = config.fp8, config.parallel.tensor_model_parallel_size
    if fp8.fp8_format is None:
        return
    multiple = 32 if fp8.fp8_recipe == "mxfp8" else 16
    heads = arch.padded_groups(tp) * arch.kv_channels
    queries = heads * (arch.num_attention_heads // arch.num_query_groups)
    ffn = arch.experts.ffn_hidden_size if arch.experts else arch.ffn_hidden_size
    widths = {
        "hidden_size": arch.hidden_size,
        "attention output a rank": queries // tp,
        "q, k and v a rank": (queries + 2 * heads) // tp,
        "MLP width a rank": ffn // tp,
    }
    for name, width in widths.items():
        if width % multiple:
            raise ValueError(
                f"--fp8-format: FP8 GEMMs need multiples of {multiple}, but {name} is {width}; "
                "lower --tensor-model-parallel-size, or leave FP8 out"
            )
    if fp8.first_last_layers_bf16:
        most = arch.num_layers // config.parallel.pipeline_model_parallel_size
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(fp8, name) > most:
                raise ValueError(
                    f"{flag_of(name)} {getattr(fp8, name)}: need 0 to {most}, the layers of a "
                    "pipeline stage"
                )


def _check_overlap(config: Config) -> None:
    layout = config.parallel
    if layout.overlap_param_gather and not (
        layout.use_distributed_optimizer and layout.overlap_grad_reduce
    ):
        raise ValueError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce"
        )


def check_row(config: Config, flag: str) -> None:
    """Raise ValueError, naming ``flag``, where a packed row cannot hold the longest rollout."""
    if not reads_data(config):  # by their own lengths: check_replay
        return
    data, cp = config.data, config.parallel.context_parallel_size
    prompt = max(data.max_prompt_length, data.max_teacher_prompt_length)
    longest = round_up(prompt + config.rollout.max_new_tokens, 2 * cp if cp > 1 else 1)
    budget = config.batching.max_tokens_per_microbatch
    padding = f", padded to a multiple of 2 x --context-parallel-size {cp}" if cp > 1 else ""
    if budget < longest:
        raise ValueError(
            f"{flag}: a rollout may have {longest} tokens (prompt and --max-new-tokens{padding}), "
            f"which a row of --max-tokens-per-microbatch {budget} must hold"
        )


def _check_userbuffers(config: Config) -> None:
    """Their buffers have the shape of one packed row (megatron_phf.model.userbuffers)."""
    if not config.parallel.tp_comm_overlap:
        return
    engine = why_missing("transformer_engine")
    fp8 = config.fp8
    needs = (
        ("--sequence-parallel", config.parallel.sequence_parallel),
        ("--pack-sequences", config.batching.pack_sequences),
        ("Transformer Engine's layers", config.model.transformer_impl != "local"),
        (f"Transformer Engine's layers: {engine}", engine is None),
        ("--dtype bf16", config.model.dtype != "fp32"),
        ("all weights trained, without --lora-rank", config.lora.lora_rank == 0),
        ("--fp8-recipe delayed or tensorwise", fp8.fp8_recipe in ("delayed", "tensorwise")),
        ("FP8 in all layers or none, no --first-last-layers-bf16", not fp8.first_last_layers_bf16),
    )
    for need, there in needs:
        if not there:
            raise ValueError(f"--tp-comm-overlap needs {need}")
    check_row(config, "--tp-comm-overlap")


def check_gpu(config: Config) -> None:
    """Raise ValueError where the flags about kernels do not fit each other or this machine."""
    _check_overlap(config)
    _check_userbuffers(config)
    _check_fp8_options(config)
    _needs_engine(config)
