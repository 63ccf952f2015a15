"""The gradient's norm that megatron-core reports and clips by, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.optimizer import clip_grads

from megatron_phf.runtime import device, grad_norm
from megatron_phf.train import optimizer  # noqa: F401  the product's way to megatron's optimizer


def reported(tensors: list[torch.Tensor]) -> torch.Tensor:
    """As megatron-core's ``get_grad_norm_fp32`` asks for it."""
    device.setup()
    flag = torch.zeros(1, dtype=torch.int)
    norm, per_tensor = clip_grads.multi_tensor_applier(
        clip_grads.l2_norm_impl, flag, [tensors], False
    )
    assert per_tensor is None
    assert norm.shape == (1,) and norm.dtype is torch.float32
    return norm


def in_fp64(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@pytest.mark.parametrize(
    "sizes",
    [(30_000_000,), (4096,), (1,), (4095, 4097, 3_000_000), (0, 5), (0,), (5_000_000, 7)],
)
def test_norm_in_fp64(sizes: tuple[int, ...]) -> None:
    """Adding up in fp32 is off by 1e-3 on the first."""
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = [torch.randn(n, generator=generator) * 1e-3 for n in sizes]
    assert float(reported(tensors)) == pytest.approx(in_fp64(tensors), rel=1e-6, abs=0)


def test_norm_of_any_shape_and_number() -> None:
    tensors = [torch.randn(70, 90, 3), torch.randn(900, 700).t(), torch.tensor(3.0)]
    assert float(reported(tensors)) == pytest.approx(in_fp64(tensors), rel=1e-6)
    assert math.isnan(float(reported([*tensors, torch.tensor([math.nan])])))
    assert math.isinf(float(reported([*tensors, torch.tensor([-math.inf])])))
    halves = [torch.randn(9000).bfloat16()]
    assert float(reported(halves)) == pytest.approx(in_fp64(halves), rel=1e-6)


def test_a_fused_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's and apex's add up chunk by chunk."""
    kernel = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)
    grad_norm.install()
    assert clip_grads.l2_norm_impl is kernel
