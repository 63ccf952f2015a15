"""What a layer keeps, by hand; tests/simulate holds it against the simulation."""

from __future__ import annotations

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.estimate.decoding import kv_cache_bytes
from megatron_phf.estimate.layer import Machine, layer_numbers
from megatron_phf.estimate.memory import phase_estimates
from megatron_phf.model.architecture import Architecture, parse_architecture
from megatron_phf.teacher.architecture import Models
from tests.simulate.cases import EXPERTS, MODEL

GIB = 2**30
STREAM, QUERIES, KEYS, FFN = 512, 1024, 256, 1536  # of a rank of two, with sequence parallelism
HALVES = Config().replaced(tensor_model_parallel_size=2, sequence_parallel=True)
# Norms' inputs; q, k, v, rotated q and k, what attention writes, q's norm; gate and up.
ALWAYS = 2 * STREAM + 4 * QUERIES + 3 * KEYS + QUERIES + 2 * FFN - QUERIES
LORA = {"lora_rank": 8}


def arch(content: dict = MODEL) -> Architecture:
    return parse_architecture(content, "here")


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, 2 * STREAM + FFN),  # what goes into each linear
        ({"pack_sequences": True}, 2 * STREAM + FFN + QUERIES),  # joined rows
        (LORA, 2 * STREAM + FFN + 7 * 8),
        # A byte of each input that is dropped: half a bf16 number.
        ({**LORA, "lora_dropout": 0.05},
         2 * STREAM + FFN + 7 * 8 + (5 * STREAM + QUERIES + FFN) / 2),
        ({**LORA, "lora_target_modules": "q_proj,v_proj", "pack_sequences": True}, STREAM + 2 * 8),
        ({**LORA, "lora_target_modules": "o_proj", "pack_sequences": True}, QUERIES + 8),
    ],
)  # fmt: skip
def test_what_a_layer_keeps(settings: dict, more: float) -> None:
    assert layer_numbers(arch(), HALVES.replaced(**settings), Machine(2, 1), 1) == ALWAYS + more


def test_frozen_experts_keep_gate_and_up_alone() -> None:
    full, adapters = (
        layer_numbers(arch(EXPERTS), HALVES.replaced(**settings), Machine(2, 1), 1)
        for settings in ({}, {**LORA, "lora_target_modules": "q_proj"})
    )
    assert full - adapters == 4 * 2 * (768 + 1024) / 2 - 8


def test_a_cache_is_as_long_as_its_capacity() -> None:
    """Prompts of 512 and 1,000 tokens more: 1,536 columns, before that 1,280 of one layer."""
    config = Config().replaced(max_prompt_length=512, max_new_tokens=1000, rollout_batch_size=4)
    found = kv_cache_bytes(arch(), config, Machine(2, 1))
    assert found == 4 * (4 * 1536 + 1280) * 2 * 4 * 128 * 2


def test_adapters_of_an_averaged_teacher() -> None:
    """Placed as weights in its pass; updated without a large copy."""
    config = HALVES.replaced(teacher="ema", use_distributed_optimizer=True, **LORA)
    phases = phase_estimates(Models(arch()), config, Machine(2, 2), 512, 0)
    adapters = phases["optimizer"]["gradients"] / 4
    assert phases["optimizer"]["teacher"] == 4 * adapters == phases["teacher update"]["teacher"]
    assert phases["teacher"]["teacher"] == (4 + 2) * adapters


def test_a_fused_adam_makes_no_roots() -> None:
    models = Models(arch())
    own, fused = (
        phase_estimates(models, Config(), Machine(2, 1, fused_adam=f), 512, 0)["optimizer"]
        for f in (False, True)
    )
    n = arch().num_parameters()
    assert (own["optimizer"] * GIB, fused["optimizer"] * GIB) == (16 * n, 12 * n)


def test_the_build_has_experts_twice_and_the_rest_once() -> None:
    """Their buffer comes last; the optimizer's weights are more where few ranks share them."""
    config = Config().replaced(use_distributed_optimizer=True)
    models, experts = Models(arch(EXPERTS)), 2 * 16 * 3 * 1024 * 768
    n = arch(EXPERTS).num_parameters()
    many = phase_estimates(models, config, Machine(2, 64), 512, 0)["build"]
    assert (many["weights"] * GIB, many["gradients"] * GIB) == (2 * (n + experts), 4 * n)
