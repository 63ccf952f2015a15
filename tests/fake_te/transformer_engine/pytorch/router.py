"""Fused routing of experts: imported by megatron-core, not used by the product."""


def fused_topk_with_score_function(*args, **kwargs):
    """Not there."""
    raise NotImplementedError


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function
