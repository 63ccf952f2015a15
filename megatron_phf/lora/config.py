"""What LoRA trains, in HuggingFace's terms, and PEFT's ``adapter_config.json``.

Without torch: the checks before launch read it too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from megatron_phf.config.settings import Config, LoraConfig
from megatron_phf.files.foreign import Fields, read_json_object, shown
from megatron_phf.model.architecture import Architecture

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# (block of a layer, Megatron's linear, the HuggingFace linears it fuses, in its order)
LINEARS = (
    ("self_attention", "linear_qkv", ("q_proj", "k_proj", "v_proj")),
    ("self_attention", "linear_proj", ("o_proj",)),
    ("mlp", "linear_fc1", ("gate_proj", "up_proj")),
    ("mlp", "linear_fc2", ("down_proj",)),
)
TARGETS = tuple(target for _, _, fused in LINEARS for target in fused)
_UNUSED: tuple[Any, ...] = (None, False, (), {})
# What each key of PEFT's LoraConfig may say, so that the adapter adds exactly
# alpha / r lora_B lora_A x to each target; a key that is not here may only be unused.  PEFT writes
# all keys, those of unused variants as null, false or empty.
ALLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"),
            *("lora_bias", "layers_to_transform", "layers_pattern", "trainable_token_indices"),
            *("target_parameters", "fan_in_fan_out", "exclude_modules", "layer_replication"),
            *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
            *("kasa_config", "velora_config", "monteclora_config", "ensure_weight_tying"),
            *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_config"),
        ),
        _UNUSED,
    ),
    # Others (pissa, olora, ...) change the base weights wherever the adapter is loaded.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "bias": ("none",),
    "peft_type": ("LORA",),
}
# Read here, or without any influence on what is computed.
READ = ("r", "lora_alpha", "target_modules")
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
)


def target_modules(lora: LoraConfig) -> tuple[str, ...]:
    """The targets of ``--lora-target-modules``, in Megatron's order.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = [name.strip() for name in lora.lora_target_modules.split(",")]
    for name in names:
        if name not in TARGETS:
            raise ValueError(
                f"--lora-target-modules {lora.lora_target_modules}: {name!r} is not one of "
                + ",".join(TARGETS)
            )
    return tuple(target for target in TARGETS if target in names)


def hf_shape(target: str, arch: Architecture, groups: int | None = None) -> tuple[int, int]:
    """(out, in) of a HuggingFace linear; with ``groups``, that of a model padded to so many."""
    groups = groups or arch.num_query_groups
    keys = groups * arch.kv_channels
    queries = keys * (arch.num_attention_heads // arch.num_query_groups)
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[target]


def num_adapter_parameters(arch: Architecture, lora: LoraConfig) -> int:
    """Trainable parameters of the whole model."""
    shapes = [hf_shape(target, arch) for target in target_modules(lora)]
    return arch.num_layers * lora.lora_rank * sum(rows + columns for rows, columns in shapes)


def tensor_name(layer: int, target: str, matrix: str) -> str:
    """PEFT's name of ``lora_A`` or ``lora_B`` in a layer (1-based)."""
    block = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"base_model.model.model.layers.{layer - 1}.{block}.{target}.{matrix}.weight"


def adapter_config(config: Config) -> dict[str, Any]:
    """``adapter_config.json`` for the adapters of a run, as PEFT and vLLM read it."""
    lora, alpha = config.lora, config.lora.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(config.model.hf_model or ""),
        "r": lora.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(target_modules(lora)),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def read_adapter_config(directory: str) -> dict[str, Any]:
    """The ``adapter_config.json`` in ``directory``.

    Raises:
        ValueError: it is missing, damaged, or of a kind of adapter that is not plain LoRA.
    """
    path = os.path.join(directory, CONFIG_FILE)
    content = read_json_object(path, "is it an adapter?")
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not the configuration of a LoRA adapter")
    _check_plain(content, path)
    targets = content.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    ):
        raise ValueError(
            f"{path}: target_modules must be a list of names, a regular expression or all-linear"
        )
    fields = Fields(path, content)
    fields.size("r")
    fields.number("lora_alpha")
    return content


def _check_plain(content: dict[str, Any], path: str) -> None:
    """Raise ValueError for a key whose value makes the adapter compute something else."""
    for name, value in content.items():
        if name in READ or name in WITHOUT_EFFECT:
            continue
        allowed = ALLOWED.get(name, _UNUSED)
        value = () if value == [] else value
        # 0 == False, and 1 == True
        if not any(type(value) is type(good) and value == good for good in allowed):
            raise ValueError(
                f"{path}: {name}: only plain LoRA is supported, not {name}="
                f"{shown(content[name])}; merge the adapter into its base model with peft"
            )


def adapted_modules(content: dict[str, Any], modules: Iterable[str], path: str) -> list[str]:
    """Those of a model's ``modules`` that an adapter's target_modules name, as peft reads them.

    A list has ends of names, a string is a regular expression for whole ones, or ``all-linear``.

    Raises:
        ValueError: a name is none of ours, or nothing is named; names ``path``.
    """
    targets, modules = content["target_modules"], list(modules)
    if targets == "all-linear":
        return modules
    if isinstance(targets, str):
        try:
            chosen = [name for name in modules if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(
                f"{path}: target_modules is no regular expression ({error})"
            ) from error
    else:
        named = {t: {n for n in modules if n == t or n.endswith(f".{t}")} for t in targets}
        chosen = [name for name in modules if any(name in each for each in named.values())]
        for target, names in named.items():
            if not names:
                raise ValueError(
                    f"{path}: target_modules names {target}, which is no linear of this model's "
                    f"layers ({', '.join(TARGETS)})"
                )
    if not chosen:
        raise ValueError(f"{path}: target_modules {targets!r} names no linear of this model")
    return chosen
