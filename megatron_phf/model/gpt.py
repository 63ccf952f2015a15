"""Build the GPT model: its chunks on this pipeline rank, from an :class:`Architecture`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.hidden.rows import SequenceShards
from megatron_phf.model.architecture import Architecture
from megatron_phf.model.attention import CausalAttention
from megatron_phf.model.fp8 import (
    alignment,
    fp8_off,
    module_configs,
    never_trained,
    state_before_rounding,
    without_fp8_state,
)
from megatron_phf.model.gpt_config import transformer_config, transformer_impl
from megatron_phf.model.layer import FlowTransformerLayer, LocalRMSNorm
from megatron_phf.model.rope import scaled_frequencies
from megatron_phf.model.userbuffers import (
    fixed_row_length,
    initialize_userbuffers,
    switched_off,
    userbuffers_off,
)
from megatron_phf.runtime import device, parallel, private_names
from megatron_phf.runtime.private_names import HiddenStatesOut


class FlowGPTModel(HiddenStatesOut, GPTModel):
    """A GPT model whose forward ends with the final norm's output, never with logits.

    The output losses project chunks of the rows that they need (``losses.chunked_divergence``).
    """

    # Waits for weights that other data-parallel ranks have updated (--overlap-param-gather).
    arriving: Callable[[], None] | None = None

    def output_weight(self) -> Tensor:
        """This rank's rows of the output head, [padded vocabulary / TP, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer, with our attention and the flow tap in it."""
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
        )
        spec.submodules.input_layernorm = LocalRMSNorm
        spec.submodules.pre_mlp_layernorm = LocalRMSNorm
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = CausalAttention
        if config.num_moe_experts:
            # The norm before experts has its own name in the other spec, hence in checkpoints.
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    spec.module = FlowTransformerLayer
    return spec


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    layer = _layer_spec(config)
    if config.transformer_impl == "transformer_engine":
        return layer
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=LocalRMSNorm)


def build_model(arch: Architecture, config: Config) -> list[FlowGPTModel]:
    """The model chunks of this pipeline rank (one, or one a virtual stage), random weights.

    All copies made from one configuration share nothing; the seed decides the weights.

    Raises:
        ValueError: this device does not have the FP8, or Transformer Engine the cut of packed
            rows, that is asked for, or lacks names that are used.
    """
    if config.fp8.fp8_format is not None:
        problem = device.fp8_support(config.fp8.fp8_recipe)
        if problem is not None:
            raise ValueError(f"--fp8-recipe {config.fp8.fp8_recipe}: {problem}")
    cut = config.batching.pack_sequences and config.parallel.context_parallel_size > 1
    engine = transformer_impl(config) == "transformer_engine"
    if cut and engine and not is_te_min_version("1.10.0"):
        raise ValueError(
            "--pack-sequences with --context-parallel-size needs Transformer Engine 1.10 or newer; "
            "update it, or leave one of the two out"
        )
    if engine:
        private_names.check([private_names.ENGINE])
    parallel.seed(config.train.seed)
    transformer = transformer_config(arch, config)
    tokens = fixed_row_length(config, sequence_shards(transformer).length_multiple)
    if tokens is not None:
        initialize_userbuffers(transformer, tokens)
    vocab = arch.padded_vocab_size(
        config.model.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
    )
    virtual = transformer.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if virtual is None else list(range(virtual)):
        chunk = FlowGPTModel(
            config=transformer,
            transformer_layer_spec=_block_spec(transformer, stage),
            vocab_size=vocab,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope.base,
            vp_stage=stage,
        )
        # megatron-core has Llama 3's numbers fixed, and scales positions, not frequencies.
        rotary = chunk.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, arch.rope)
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(chunk.to(device.device()))
    return chunks


def sequence_shards(config: TransformerConfig) -> SequenceShards:
    """How this process's layers see a sequence."""
    context = parallel.context_parallel_group() if config.context_parallel_size > 1 else None
    sequence = parallel.tensor_parallel_group() if config.sequence_parallel else None
    return SequenceShards(context, sequence, alignment(config))


def set_padding(chunks: Sequence[torch.nn.Module], masks: Sequence[Tensor] | None) -> None:
    """Let the routers of ``chunks`` know each microbatch's padding, as this process holds it."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.padding = masks


def wait_for_weights(chunks: Sequence[FlowGPTModel]) -> None:
    """Before anything reads the weights of ``chunks``: they may still be on their way here."""
    for chunk in chunks:
        if chunk.arriving is not None:
            chunk.arriving()
            chunk.arriving = None


def frozen_copy(chunks: list[FlowGPTModel], arch: Architecture, config: Config) -> Any:
    """A second model with the same weights, in eval mode, without gradients, DDP or optimizer.

    Without FP8: its passes never are in FP8 (see ``evaluating``).
    """
    copy = build_model(arch, never_trained(config))
    for source, target in zip(chunks, copy, strict=True):
        state = without_fp8_state(state_before_rounding(source))
        left = target.load_state_dict(state, strict=False)
        assert not left.unexpected_keys and not without_fp8_state(dict.fromkeys(left.missing_keys))
        target.eval().requires_grad_(False)
    return copy


@contextlib.contextmanager
def evaluating(chunks: Sequence[FlowGPTModel]) -> Iterator[None]:
    """No gradients, eval mode (no activation recompute), FP8 or userbuffers; as before after.

    FP8 would leave the statistics of a pass that is not trained on in the student's scales.
    """
    wait_for_weights(chunks)
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad(), fp8_off(chunks), userbuffers_off(chunks):
            yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def without_sequence_parallel(
    chunks: list[FlowGPTModel],
) -> contextlib.AbstractContextManager[None]:
    """Turn sequence parallelism off within: a rollout decodes one token, which has no parts."""
    names = ("sequence_parallel", "reduce_scatter_embeddings")
    owners = [x for chunk in chunks for x in (*module_configs(chunk), *chunk.modules())]
    return switched_off(owners, names)
