"""What one layer keeps of a pass, and needs for a moment, by formula.  No import of torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.lora.config import target_modules
from megatron_phf.model.architecture import Architecture

# Copies of what is routed to experts, one after the other on the way there and back.
_ROUTED_COPIES = 6


@dataclass(frozen=True)
class Machine:
    """``width``: bytes of a weight; ``replicas``: data-parallel ranks.

    Without ``cuda`` norms and SwiGLU are not fused and keep more.  ``fused_adam``: megatron-core
    has found Transformer Engine's or apex's, which update in place.
    """

    width: int
    replicas: int
    cuda: bool = True
    fused_adam: bool = False


def widths(arch: Architecture, config: Config) -> tuple[float, float, float]:
    """Numbers a token and rank of the residual stream, the queries, the keys."""
    p = config.parallel
    tp = p.tensor_model_parallel_size
    groups = arch.padded_groups(tp)
    heads = groups * (arch.num_attention_heads // arch.num_query_groups)
    stream = arch.hidden_size / (tp if p.sequence_parallel else 1)
    return stream, heads * arch.kv_channels / tp, groups * arch.kv_channels / tp


def layer_numbers(arch: Architecture, config: Config, machine: Machine, sequences: int) -> float:
    """Numbers a token that one layer keeps for backward, of a microbatch of ``sequences``.

    A linear keeps its input for the gradient of its weight, or of an adapter's: where neither is
    trained, nobody does.
    """
    tp = config.parallel.tensor_model_parallel_size
    ffn = arch.ffn_hidden_size / tp
    stream, queries, keys = widths(arch, config)
    inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), stream)
    inputs |= {"o_proj": queries, "down_proj": ffn}
    trained = {*target_modules(config.lora)} if config.lora.lora_rank else {*inputs}
    # A norm's input; where it is not one kernel, and trained, the scaled input in between too.
    whole_norms = machine.cuda or config.lora.lora_rank > 0
    kept = 2 * (stream if whole_norms else 2 * stream)
    # q, k, v as one tensor; rotated q and k; the attention's output.
    kept += (queries + 2 * keys) + (queries + keys) + queries
    if arch.qk_layernorm:  # reads q from a tensor of its own
        kept += queries if whole_norms else 2 * queries + keys
    kept += stream * bool(trained & {"q_proj", "k_proj", "v_proj"})
    if "o_proj" in trained and _joins(config, sequences):
        kept += queries
    if config.lora.lora_rank:  # lora_A's result, and one byte of each number of a dropped input
        masks = sum(inputs[name] for name in trained) / machine.width
        kept += config.lora.lora_rank * len(trained) + (masks if config.lora.lora_dropout else 0.0)
    return kept + _mlp_numbers(arch, config, machine, trained) + context_numbers(arch, config)


def _mlp_numbers(arch: Architecture, config: Config, machine: Machine, trained: set[str]) -> float:
    tp = config.parallel.tensor_model_parallel_size
    stream = widths(arch, config)[0]
    # gate and up as one tensor; without a fused kernel silu(gate) and a copy of up.
    ffn = 2 if machine.cuda else 4
    if arch.experts is None:
        product = "down_proj" in trained
        norm = stream * bool(trained & {"gate_proj", "up_proj"})
        return norm + (ffn + product) * arch.ffn_hidden_size / tp
    expert = ffn * arch.experts.ffn_hidden_size / tp
    if not config.lora.lora_rank:  # adapters leave experts frozen
        expert += 2 * (arch.experts.ffn_hidden_size + arch.hidden_size) / tp
    return stream + arch.experts.per_token * expert  # the router keeps the norm's output


def _joins(config: Config, sequences: int) -> bool:
    """Whether the output projection's input is a copy of what attention has written.

    Sequences attend one after the other, or stand behind each other in a batch.
    """
    if config.model.transformer_impl == "transformer_engine":
        return False
    packed = config.batching.pack_sequences
    return (packed or sequences > 1) and config.parallel.context_parallel_size == 1


def momentary_numbers(arch: Architecture, config: Config) -> float:
    """Numbers a token that a layer needs beside what it keeps: in a forward pass, or backward."""
    tp = config.parallel.tensor_model_parallel_size
    stream = 2 * widths(arch, config)[0]
    if arch.experts is None:
        return stream + 4 * arch.ffn_hidden_size / tp
    routed = _ROUTED_COPIES * arch.hidden_size + 3 * arch.experts.ffn_hidden_size / tp
    return stream + arch.experts.per_token * routed


def context_numbers(arch: Architecture, config: Config) -> float:
    """Numbers a token more under context parallelism without Transformer Engine.

    Keys and values of the whole row, one for each query's head, and what each query may see of
    its own sequence (model/attention.py); of packed ones the outputs, joined.
    """
    size = config.parallel.context_parallel_size
    if size == 1 or config.model.transformer_impl == "transformer_engine":
        return 0.0
    _, queries, _ = widths(arch, config)
    row = config.data.max_prompt_length + config.rollout.max_new_tokens
    return 2 * queries * size + row + queries * config.batching.pack_sequences
