"""Bytes that a rank sends in a step, by hand."""

from __future__ import annotations

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.estimate.traffic import traffic
from megatron_phf.model.architecture import parse_architecture
from tests.unit.cli.test_plan import MODELS

# 30B-A3B: 48 layers of 128 experts with three matrices of 2048 x 768.
EXPERTS = 48 * 128 * 3 * 2048 * 768


def sent(name: str, replicas: int, **settings: object) -> dict[str, float]:
    """Of 1,000 tokens, with SP."""
    config = Config().replaced(sequence_parallel=True, **settings)
    return traffic(parse_architecture(MODELS[name][0], name), config, replicas, 1000)


def test_dense_by_hand() -> None:
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    found = sent("8B", 2, **layout)
    whole = 1000 * 4096 * 2  # of the hidden states
    # Both halves of 18 layers: 2 in the student's forward pass and the teacher's, 3 in backward.
    assert found["tensor"] == 2 * 18 * (2 + 2 + 3) * whole * 3 / 4
    assert found["pipeline"] == 3 * whole / 4
    parameters = parse_architecture(MODELS["8B"][0], "8B").num_parameters()
    assert found["data"] == parameters / 8 * (4 + 2) / 2
    assert found["experts"] == found["expert tensor"] == 0
    again = sent("8B", 2, **layout, recompute_granularity="full")
    assert again["tensor"] == 2 * 18 * (2 + 2 + 2 + 3) * whole * 3 / 4


def test_adapters_by_hand() -> None:
    """r = 64 on all linears: their gradients alone travel; frozen weights gather no input again."""
    found = sent("8B", 2, tensor_model_parallel_size=4, lora_rank=64)
    assert found["tensor"] == 2 * 36 * (2 + 2 + 2) * 1000 * 4096 * 2 * 3 / 4
    h, kv, ffn = 4096, 1024, 12288
    sides = (h + h) + 2 * (h + kv) + (h + h) + 2 * (h + ffn) + (ffn + h)  # q, k and v, o, gate ...
    assert found["data"] == 36 * 64 * sides / 4 * (4 + 2) / 2


@pytest.mark.parametrize(
    ("cut", "channels", "sharers"),
    [(None, 1, 1), (1, 0, 2)],  # of the 8 ranks 4 x 2 have one part of the experts, or 4 x 1
)
def test_experts_by_hand(cut: int | None, channels: int, sharers: int) -> None:
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}
    found = sent("30B-A3B", 4, **layout, expert_tensor_parallel_size=cut)
    whole = 1000 * 2048 * 2
    assert found["tensor"] == 48 * (2 + 2 + 3) * whole / 2  # attention alone
    routed = 8 * whole / 2  # a rank has half of the tokens, each goes to 8 experts
    ways = 2 * 3 * 48  # there and back: student's forward and backward pass, teacher's forward
    assert found["experts"] == ways * routed * 3 / 4
    assert found["expert tensor"] == ways / 2 * routed * (1 + 2) * channels  # sums are fp32
    dense = parse_architecture(MODELS["30B-A3B"][0], "x").num_parameters() - EXPERTS
    part = EXPERTS / (4 * (cut or 2)) * (sharers - 1) / sharers
    assert found["data"] == pytest.approx((dense / 2 * 3 / 4 + part) * (4 + 2))
