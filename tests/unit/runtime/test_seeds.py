"""Which ranks draw the same random numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random

from megatron_phf.runtime import device, parallel

RANKS = {
    "pipeline": "get_pipeline_model_parallel_rank",
    "data": "get_data_parallel_rank",
    "context": "get_context_parallel_rank",
    "tensor": "get_tensor_model_parallel_rank",
}


def test_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens or layers have other masks; what all TP ranks hold alike, equal ones."""
    device.setup()
    for other in ("get_expert_model_parallel_rank", "get_expert_tensor_parallel_rank"):
        monkeypatch.setattr(random, other, lambda *args: 0)
    draws: dict[tuple[int, ...], tuple[float, float]] = {}
    for ranks in itertools.product(range(2), repeat=4):
        for name, rank in zip(RANKS.values(), ranks, strict=True):
            for module in (mpu, random):  # which has some of them by their own names
                monkeypatch.setattr(
                    module, name, lambda *args, rank=rank, **kwargs: rank, raising=False
                )
        parallel.seed_dropout(1234, 7)
        shared = float(torch.rand(()))
        with tensor_parallel.get_cuda_rng_tracker().fork():
            draws[ranks] = shared, float(torch.rand(()))
    assert len({shared for shared, _ in draws.values()}) == 8  # TP ranks share theirs
    assert len({own for _, own in draws.values()}) == 16
    for (*ranks, _), (shared, _) in draws.items():
        assert shared == draws[*ranks, 0][0]
