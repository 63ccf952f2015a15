"""config.json as transformers reads it: the same numbers, or one error; never something else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from megatron_phf.model.architecture import Architecture, parse_architecture
from megatron_phf.model.families import FAMILIES, Family
from megatron_phf.model.rope import KNOWN, scaled_frequencies

BASE = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.03,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "layer_types": ["full_attention"], "per_layer_config": None, "rope_theta": 5000.0,
    "rope_scaling": None, "rope_parameters": None,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "norm_topk_prob": True, "router_aux_loss_coef": 0.01, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip


def config(model_type: str, **changes: Any) -> dict:
    more = EXPERTS if model_type == "qwen3_moe" else {}
    content = {"model_type": model_type, **BASE, **more, **changes}
    return {name: value for name, value in content.items() if value != "MISSING"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def theirs(content: dict, directory: Path) -> Any:
    """transformers' model of this config.json, or None where it fails."""
    (directory / "config.json").write_text(json.dumps(content))
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    except Exception:  # of many kinds
        return None


def ours(content: dict) -> Architecture | None:
    """Our reading, or None where it is refused by name."""
    try:
        return parse_architecture(content, "config.json")
    except ValueError as error:
        assert str(error).startswith("config.json: ")
        return None


def rotary(arch: Architecture) -> RotaryEmbedding:
    """megatron-core's, as ``build_model`` makes it."""
    made = RotaryEmbedding(
        arch.kv_channels, 1.0, rotary_base=arch.rope.base, use_cpu_initialization=True
    )
    made.inv_freq = scaled_frequencies(made.inv_freq, arch.rope)
    return made


def same_rope(arch: Architecture, model: Any) -> None:
    expected, found = model.model.rotary_emb, rotary(arch)
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert expected.attention_scaling == 1.0
    angles = found.get_freqs_non_repeated(512)  # all positions that the model has
    cos, sin = expected(torch.zeros(1), torch.arange(512)[None])
    assert torch.equal(torch.cat((angles, angles), -1).cos(), cos[0])
    assert torch.equal(torch.cat((angles, angles), -1).sin(), sin[0])


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
# What ``rope_scaling`` or ``rope_parameters`` may hold.
TABLES: dict[str, Any] = {
    "absent": "MISSING",
    "null": None,
    "empty": {},
    "base": {"rope_theta": 7000.0},
    "default": {"rope_type": "default", "rope_theta": 7000},
    "old default": {"type": "default"},
    "null base": {"rope_type": "default", "rope_theta": None},
    "null type": {"rope_type": None, "type": "linear", "factor": 2.0},
    "leftovers": {"rope_type": "default", "factor": 4.0, "attention_factor": 2.0},
    "linear": {"type": "linear", "factor": 4.0},
    "linear 5": {"rope_type": "linear", "factor": 2, "rope_theta": 7000.0},
    "both types": {"rope_type": "linear", "type": "yarn", "factor": 2.0},
    "no factor": {"rope_type": "linear"},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3 5": {"rope_type": "llama3", "rope_theta": 7000.0, **LLAMA3, "low_freq_factor": 2},
    "llama3 no original": {"type": "llama3", "factor": 4, "low_freq_factor": 1,
                           "high_freq_factor": 3.0},
    "llama3 incomplete": {"rope_type": "llama3", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "su": {"type": "su", "factor": 2.0},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "whole": {"rope_type": "default", "partial_rotary_factor": 1.0},
    "by layer": {"full_attention": {"rope_type": "default", "rope_theta": 7000.0}},
    "by layer null": {"full_attention": None, "rope_theta": 7000.0},
}  # fmt: skip
BOTH = ("absent", "null", "empty", "base", "default", "old default", "linear", "llama3 5")
ROPES = {
    **{f"scaling {name}": {"rope_scaling": table} for name, table in TABLES.items()},
    **{f"parameters {name}": {"rope_parameters": table} for name, table in TABLES.items()},
    **{
        f"{one} and {other}": {"rope_scaling": TABLES[one], "rope_parameters": TABLES[other]}
        for one, other in itertools.product(BOTH, BOTH)
    },
    "partial beside": {"partial_rotary_factor": 0.5},
    "linear, partial beside": {"partial_rotary_factor": 0.5, "rope_scaling": TABLES["linear"]},
    "original beside": {
        "rope_scaling": TABLES["llama3"], "original_max_position_embeddings": 64,
    },
    "null original beside": {
        "rope_scaling": TABLES["llama3"], "original_max_position_embeddings": None,
    },
}  # fmt: skip
# Spellings that must be read, not refused: (base, factor, has Llama 3's scaling).
READ = {
    "scaling base": (7000.0, 1.0, False),
    "parameters base": (7000.0, 1.0, False),
    "scaling leftovers": (5000.0, 1.0, False),
    "scaling linear": (5000.0, 4.0, False),
    "parameters linear 5": (7000.0, 2.0, False),
    "scaling both types": (5000.0, 2.0, False),
    "parameters llama3 5": (7000.0, 8.0, True),
    "scaling llama3 no original": (5000.0, 4.0, True),
    "linear and default": (5000.0, 4.0, False),  # rope_scaling decides alone
    "empty and default": (7000.0, 1.0, False),
    "original beside": (5000.0, 8.0, True),
}


@pytest.mark.parametrize("theta", [5000.0, "MISSING", None], ids=str)
def test_every_spelling_of_rope(theta: object, tmp_path: Path) -> None:
    """Each on one of the four architectures, whose rotary embeddings are one code."""
    read = 0
    kinds = itertools.cycle(FAMILIES)
    for name, changes in ROPES.items():
        content = config(next(kinds), **changes, rope_theta=theta)
        arch = ours(content)
        if arch is not None:
            model = theirs(content, tmp_path)
            assert model is not None, f"{name}: transformers fails"
            same_rope(arch, model)
            read += 1
    assert read >= (35 if theta is None else 60)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_spellings_that_are_read(name: str, model_type: str) -> None:
    arch = ours(config(model_type, **ROPES[name]))
    assert arch is not None
    rope = arch.rope
    assert (rope.base, rope.factor, rope.llama3 is not None) == READ[name]


@pytest.mark.parametrize("kind", [*ROPE_INIT_FUNCTIONS, "default", "su"])
def test_kinds_of_rope(kind: str) -> None:
    """A new kind of transformers' is refused by its name."""
    content = config("llama", rope_scaling={"rope_type": kind, **LLAMA3})
    if kind in ("default", "linear", "llama3"):
        parse_architecture(content, "config.json")
    else:
        with pytest.raises(ValueError, match=f"config.json: rope scaling '{kind}' is not supp"):
            parse_architecture(content, "config.json")


def test_the_names_of_rope_parameters_are_transformers() -> None:
    assert get_type_hints(RopeParameters).keys() | {"type"} == KNOWN


FIELDS = [(kind, name) for kind in FAMILIES for name in config(kind) if name != "model_type"]
# Nulls that transformers takes, and what they mean.
NULLS = {"rope_scaling", "rope_parameters", "layer_types", "per_layer_config", "mlp_only_layers"}


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_missing_and_null_fields(kind: str, name: str, tmp_path: Path) -> None:
    """A field that is not there or null means what it means to transformers, or is refused."""
    read = []
    for value in ("MISSING", None):
        content = config(kind, **{name: value})
        arch = ours(content)
        if arch is None:
            continue
        read.append(value)
        model = theirs(content, tmp_path)
        assert model is not None, f"{name}={value}: transformers fails"
        c, attention = model.config, model.model.layers[0].self_attn
        assert attention.q_proj.weight.shape == (c.num_attention_heads * arch.kv_channels, 64)
        assert attention.k_proj.weight.shape == (arch.num_query_groups * arch.kv_channels, 64)
        numbers = (arch.layernorm_epsilon, arch.tie_word_embeddings, arch.initializer_range)
        assert numbers == (c.rms_norm_eps, c.tie_word_embeddings, c.initializer_range)
        same_rope(arch, model)
        if arch.experts is not None:
            assert arch.experts.count == c.num_experts
            assert arch.experts.normalize_weights == c.norm_topk_prob
            assert arch.experts.aux_loss_coeff == c.router_aux_loss_coef
            assert type(model.model.layers[0].mlp).__name__ == "Qwen3MoeSparseMoeBlock"
    if name in NULLS:
        assert read == ["MISSING", None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"]}, r"layer_types=\['sliding_attention'\]"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention'"),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config="),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    ],
)
def test_layers_that_differ_from_each_other(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_architecture(config("qwen3_moe", **changes), "config.json")


def test_another_decoder_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral without its window: what it has, and what the row refuses, is transformers'."""
    only = {"sliding_window": None, "hidden_act": "silu", "attention_bias": False}
    row = Family("mistral", only=only, rope_kinds=("default",), may_lack=("head_dim",))
    content = config("mistral", sliding_window=None)
    with pytest.raises(ValueError, match=r"model_type 'mistral' is not supported \(only qwen3, "):
        parse_architecture(content, "config.json")
    monkeypatch.setitem(FAMILIES, "mistral", row)
    arch, model = ours(content), theirs(content, tmp_path)
    assert arch is not None and not arch.qk_layernorm and not arch.add_qkv_bias
    assert arch.num_parameters() == sum(p.numel() for p in model.parameters())
    same_rope(arch, model)
    for key, value, message in (
        ("sliding_window", 64, r"sliding_window=64 is not supported \(only None\)"),
        ("rope_scaling", TABLES["linear"], r"rope scaling 'linear' is not supp.* \(only default\)"),
        ("attention_bias", None, "attention_bias=None is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_architecture({**content, key: value}, "config.json")


@pytest.mark.parametrize(("model_type", "row"), FAMILIES.items())
def test_every_row_counts_transformers_weights(
    model_type: str, row: Family, tmp_path: Path
) -> None:
    content = config(model_type)
    arch, model = ours(content), theirs(content, tmp_path)
    assert arch is not None
    names = dict(model.named_parameters())
    assert arch.num_parameters() == sum(p.numel() for p in names.values())
    attention = "model.layers.0.self_attn."
    assert row.qk_layernorm == (attention + "q_norm.weight" in names)
    assert row.qkv_bias == (attention + "q_proj.bias" in names)
    assert (row.experts is not None) == ("model.layers.0.mlp.gate.weight" in names)
