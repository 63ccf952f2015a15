"""Mixture of experts: megatron-core's settings of it, and its load-balancing loss.

With E experts, k a token, and over the T tokens (prompt and response, padding left out) of one
microbatch of one data-parallel rank, a layer's load-balancing loss is

    E * sum_i f_i P_i,   f_i = (tokens routed to i) / (T k),   P_i = (sum of softmax(logits)_i) / T

which is 1 for a balanced router.  The training objective gets ``aux_loss_coeff`` times the sum over
layers, averaged over microbatches and data-parallel ranks: megatron-core's ``aux_loss`` (Switch
Transformer, arXiv:2101.03961), computed in its router and attached to the routing weights.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)

from megatron_phf.config.settings import Config
from megatron_phf.model.architecture import Architecture, aux_loss_coeff

_TRACKED = "load_balancing_loss"
# megatron-core's router asks for it, and does not define it where Transformer Engine is absent.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def moe_settings(arch: Architecture, config: Config, grouped_gemm: bool) -> dict[str, Any]:
    """The fields of megatron-core's ``TransformerConfig`` about experts; none without them.

    Dropless (no capacity).  Tokens travel by all-to-all: of megatron-core's dispatchers the
    all-gather one needs equally many on every rank, which rollouts do not have.
    """
    experts = arch.experts
    if experts is None:
        return {}
    coefficient = aux_loss_coeff(arch, config)
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # After the choice of k, a softmax over their logits is the normalised one.
        "moe_router_pre_softmax": not experts.normalize_weights,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if coefficient > 0 else "none",
        "moe_aux_loss_coeff": coefficient,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped_gemm,
        "expert_model_parallel_size": config.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.parallel.expert_tensor_size,
    }


def reset_aux_loss() -> None:
    """Forget what earlier microbatches left in megatron-core's tracker."""
    clear_aux_losses_tracker()


def mean_aux_loss(arch: Architecture, config: Config, microbatches: int) -> float | None:
    """The load-balancing loss since :func:`reset_aux_loss`, without its coefficient.

    Mean over layers, a rank's ``microbatches`` and data-parallel ranks.  Collective; None where it
    is not computed.
    """
    if aux_loss_coeff(arch, config) == 0:
        return None
    reduce_aux_losses_tracker_across_ranks([_TRACKED])
    values = get_moe_layer_wise_logging_tracker()[_TRACKED]["values"]
    total = float(values.sum())
    clear_aux_losses_tracker()
    return total / arch.num_layers / microbatches
