"""megatron-core's configuration of an :class:`Architecture` in a parallel layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from megatron_phf.config.settings import Config
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.fp8 import fp8_settings
from megatron_phf.model.moe import moe_settings
from megatron_phf.runtime import device, kernels

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_dtype(config: Config) -> torch.dtype:
    """The dtype of weights and activations."""
    name = config.model.dtype
    return device.default_dtype() if name == "auto" else _DTYPES[name]


def transformer_impl(config: Config) -> str:
    """``local`` or ``transformer_engine``."""
    if config.model.transformer_impl != "auto":
        return config.model.transformer_impl
    engine = device.has_cuda() and device.has_module("transformer_engine")
    return "transformer_engine" if engine else "local"


def _has_grouped_gemm(implementation: str) -> bool:
    """Whether the experts of a rank can be one grouped GEMM; one after the other otherwise."""
    return implementation == "transformer_engine" and is_te_min_version("1.9.0.dev0")


def _recompute(config: Config) -> dict[str, Any]:
    layout = config.parallel
    if layout.recompute_granularity != "full":
        return {"recompute_granularity": layout.recompute_granularity}
    return {
        "recompute_granularity": "full",
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
    }


def transformer_config(arch: Architecture, config: Config) -> TransformerConfig:
    """megatron-core's configuration of ``arch`` in the parallel layout of ``config``."""
    layout, dtype = config.parallel, model_dtype(config)
    tp = layout.tensor_model_parallel_size
    groups = arch.padded_groups(tp)
    virtual = layout.num_virtual_stages_per_pipeline_rank
    on_gpu, implementation = device.has_cuda(), transformer_impl(config)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=groups * (arch.num_attention_heads // arch.num_query_groups),
        num_query_groups=groups,
        kv_channels=arch.kv_channels,
        qk_layernorm=arch.qk_layernorm,
        add_qkv_bias=arch.add_qkv_bias,
        layernorm_epsilon=arch.layernorm_epsilon,
        init_method_std=arch.initializer_range,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=layout.sequence_parallel and tp > 1,
        tp_comm_overlap=layout.tp_comm_overlap,
        context_parallel_size=layout.context_parallel_size,
        num_layers_in_first_pipeline_stage=layout.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=layout.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=layout.account_for_loss_in_pipeline_split,
        transformer_impl=implementation,
        attention_backend=AttnBackend.auto,
        # These fuse by torch.compile or CUDA extensions, and only pay on a GPU.
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=kernels.rope(implementation).on,
        gradient_accumulation_fusion=kernels.gradient_accumulation(config).on,
        # Interleaved stages exchange shapes through batched sends otherwise, which gloo lacks.
        batch_p2p_comm=on_gpu and virtual == 1,
        # A wait for the whole device after each message, for a fault of torch long before ours.
        batch_p2p_sync=False,
        overlap_p2p_comm=False,
        # Microbatches of their own lengths: each message is announced by its shape.
        variable_seq_lengths=config.batching.max_tokens_per_microbatch > 0,
        deallocate_pipeline_outputs=True,
        **_recompute(config),
        **fp8_settings(config),
        # Without experts too: the only dispatcher that megatron-core lets have such lengths.
        **{
            "moe_token_dispatcher_type": "alltoall",
            **moe_settings(arch, config, grouped_gemm=_has_grouped_gemm(implementation)),
        },
    )
