"""What config.json says about a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.files.foreign import Fields


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that takes the place of the MLP in every layer.

    ``ffn_hidden_size``: channels of one expert; ``normalize_weights``: the weights of a token's
    ``per_token`` experts are scaled to sum 1; ``aux_loss_coeff``: of the load-balancing loss.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalize_weights: bool
    aux_loss_coeff: float


def read_experts(content: Fields) -> Experts | None:
    if content.text("model_type") != "qwen3_moe":
        return None
    # transformers 5 writes num_local_experts, the models on the hub say num_experts.
    name = "num_local_experts" if "num_local_experts" in content.content else "num_experts"
    experts = Experts(
        count=content.size(name),
        per_token=content.size("num_experts_per_tok"),
        ffn_hidden_size=content.size("moe_intermediate_size"),
        normalize_weights=content.boolean("norm_topk_prob", False),
        aux_loss_coeff=content.number("router_aux_loss_coef", 0.001, zero=True),
    )
    if experts.per_token == 1 and experts.normalize_weights:
        raise ValueError(
            f"{content.path}: num_experts_per_tok=1 with norm_topk_prob gives every expert the "
            "weight 1, which megatron-core does not support; use more experts a token"
        )
    return experts
