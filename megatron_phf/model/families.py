"""The table of architectures: what a ``model_type`` means beside what its ``config.json`` says.

Another decoder of this build (RMSNorm before attention and MLP, rotary positions, a gated MLP or
experts) is another row, and a case of the tests.  No import of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_phf.files.foreign import Fields, shown
from megatron_phf.model.experts import ExpertKeys
from megatron_phf.model.rope import KINDS

_GROUPS, _CHANNELS = "num_key_value_heads", "head_dim"
# Keys that change what is computed, with the one value that Megatron computes the same for; a file
# without the key is as good, and so is null for a list or an object.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "mlp_only_layers": [],
    "per_layer_config": {},
    "transformers_weights": None,
}


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        bridge: mbridge's name of the model, whose map of weights is used.
        qk_layernorm: queries and keys are normalised.
        qkv_bias: q, k and v have a bias.
        experts: the keys of a mixture of experts that takes each MLP's place.
        attention: the kind of every layer, as ``layer_types`` names it.
        rope_kinds: of scaled rotary positions.
        only: key -> the one value that is computed right.
        may_lack, may_be_null: of the sizes of heads, which transformers fills in as it is done
            here; it has numbers of its own for Qwen's where they lack, which mean nothing.
    """

    bridge: str
    qk_layernorm: bool = False
    qkv_bias: bool = False
    experts: ExpertKeys | None = None
    attention: str = "full_attention"
    rope_kinds: tuple[str, ...] = KINDS
    only: Mapping[str, Any] = field(default_factory=lambda: _ONLY)
    may_lack: tuple[str, ...] = ()
    may_be_null: tuple[str, ...] = (_GROUPS,)

    def refuse_unsupported(self, content: Fields) -> None:
        """Raise ValueError for a key whose value Megatron would get wrong."""
        for name, value in self.only.items():
            found = content.content.get(name, value)
            if found != value and not (found is None and isinstance(value, list | dict)):
                raise ValueError(
                    f"{content.path}: {name}={shown(found)} is not supported (only {value!r})"
                )
        layers = content.content.get("layer_types") or []
        if not isinstance(layers, list) or any(kind != self.attention for kind in layers):
            raise ValueError(
                f"{content.path}: layer_types={shown(layers)} is not supported (only "
                f"{self.attention!r})"
            )

    def head_sizes(self, content: Fields, heads: int, hidden_size: int) -> tuple[int, int]:
        """(key/value groups, channels a head)."""
        defaults = {_GROUPS: heads, _CHANNELS: max(1, hidden_size // heads)}
        groups, channels = (
            content.size(
                name,
                default if name in content.content or name in self.may_lack else None,
                nullable=name in self.may_be_null,
            )
            for name, default in defaults.items()
        )
        return groups, channels


_QWEN_EXPERTS = ExpertKeys(
    # transformers 5 writes the first, the models on the hub have the second
    count=("num_local_experts", "num_experts"),
    per_token="num_experts_per_tok",
    ffn_hidden_size="moe_intermediate_size",
    normalize_weights="norm_topk_prob",
    aux_loss_coeff="router_aux_loss_coef",
)
FAMILIES: dict[str, Family] = {
    "qwen3": Family("qwen3", qk_layernorm=True),
    "qwen3_moe": Family(
        "qwen3_moe",
        qk_layernorm=True,
        experts=_QWEN_EXPERTS,
        only={**_ONLY, "decoder_sparse_step": 1},  # experts in every layer
        may_be_null=(),
    ),
    "qwen2": Family(
        "qwen2",
        qkv_bias=True,
        only={name: value for name, value in _ONLY.items() if name != "attention_bias"},
        may_lack=(_CHANNELS,),
    ),
    "llama": Family("llama", may_lack=(_GROUPS, _CHANNELS), may_be_null=(_GROUPS, _CHANNELS)),
}


def family_of(content: Fields) -> Family:
    """The row of a ``config.json``.

    Raises:
        ValueError: there is none, or the file asks for what Megatron would compute differently.
    """
    model_type = content.content.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(
            f"{content.path}: model_type {shown(model_type)} is not supported (only "
            f"{', '.join(FAMILIES)})"
        )
    family.refuse_unsupported(content)
    return family
