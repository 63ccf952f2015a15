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


@dataclass(frozen=True)
class ExpertKeys:
    """Where a ``config.json`` has the fields of :class:`Experts`; of ``count``, the first there."""

    count: tuple[str, ...]
    per_token: str
    ffn_hidden_size: str
    normalize_weights: str
    aux_loss_coeff: str


def read_experts(content: Fields, keys: ExpertKeys) -> Experts:
    """The mixture of experts of a ``config.json``; ValueError where Megatron has none such."""
    counts = [name for name in keys.count if name in content.content]
    experts = Experts(
        count=content.size((counts or keys.count[-1:])[0]),
        per_token=content.size(keys.per_token),
        ffn_hidden_size=content.size(keys.ffn_hidden_size),
        normalize_weights=content.boolean(keys.normalize_weights, False),
        aux_loss_coeff=content.number(keys.aux_loss_coeff, 0.001, zero=True),
    )
    if experts.per_token == 1 and experts.normalize_weights:
        raise ValueError(
            f"{content.path}: num_experts_per_tok=1 with norm_topk_prob gives every expert the "
            "weight 1, which megatron-core does not support; use more experts a token"
        )
    return experts
