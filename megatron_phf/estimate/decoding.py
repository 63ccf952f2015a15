"""What rollouts in process need, by formula.  No import of torch."""

from __future__ import annotations

from megatron_phf.config.settings import Config
from megatron_phf.estimate.layer import Machine, momentary_numbers, widths
from megatron_phf.estimate.stage import layers_of_stages
from megatron_phf.model.architecture import Architecture
from megatron_phf.rollout.megatron.capacity import capacity_before, capacity_for


def kv_cache_bytes(arch: Architecture, config: Config, machine: Machine, stage: int = 0) -> float:
    """Keys and values of one batch of rollouts on a rank, of as many tokens as allowed.

    The cache grows layer by layer: one of them has its last size, too.
    """
    keys = widths(arch, config)[2]
    columns = config.data.max_prompt_length + config.rollout.max_new_tokens - 1
    layers = layers_of_stages(arch.num_layers, config.parallel)[stage]
    length = layers * capacity_for(columns) + capacity_before(columns)
    return _decoded_rows(config, machine) * length * 2 * keys * machine.width


def _decoded_rows(config: Config, machine: Machine) -> float:
    rollouts = config.train.global_batch_size / machine.replicas
    return min(config.rollout.rollout_batch_size, rollouts)


def prefill_bytes(arch: Architecture, config: Config, machine: Machine) -> float:
    """What a layer needs for a moment where the prompts of a batch of rollouts are read."""
    tokens = _decoded_rows(config, machine) * config.data.max_prompt_length
    whole = config.replaced(sequence_parallel=False)  # as decoding is
    return tokens * (momentary_numbers(arch, whole) + 2 * arch.hidden_size) * machine.width
