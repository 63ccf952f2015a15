"""How adapters join a linear layer: the fused output's order, the normed input, on and off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_phf.lora.adapter import _DroppedLinear
from megatron_phf.lora.linears import _attach, adapters_off


class Adapter(torch.nn.Module):
    """A low-rank product without any parallelism."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = torch.randn(2, columns), torch.randn(rows, 2)

    def forward(self, x: Tensor, sequence_parallel: bool) -> Tensor:
        return x @ self.a.T @ self.b.T


class NormLinear(torch.nn.Module):
    """Answers as megatron's wrapper of Transformer Engine's LayerNormLinear does."""

    sequence_parallel = False

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.return_layernorm_output = False
        self.weight, self.norm = torch.randn(rows, columns), torch.nn.RMSNorm(columns)

    def forward(self, x: Tensor):
        normed = self.norm(x)
        output = normed @ self.weight.T
        return ((output, normed) if self.return_layernorm_output else output), None


class Linear(NormLinear):
    """One without a norm, and without the attribute."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        del self.return_layernorm_output

    def forward(self, x: Tensor):
        return x @ self.weight.T, None


def test_a_fused_norms_result_is_the_adapters_input() -> None:
    torch.manual_seed(0)
    layer, adapter, x = NormLinear(6, 4), Adapter(6, 4), torch.randn(3, 2, 4)
    base, _ = layer(x)
    _attach(layer, {"q_proj": adapter}, {"q_proj": 6})
    normed = layer.norm(x)
    output, bias = layer(x)
    assert bias is None
    torch.testing.assert_close(output, base + adapter(normed, False))
    assert float((adapter(normed, False) - adapter(x, False)).detach().norm()) > 0.1
    with adapters_off([torch.nn.ModuleList([layer])]):
        assert torch.equal(layer(x)[0], base)
    assert not torch.equal(layer(x)[0], base)


def test_query_groups_alternate_q_k_and_v() -> None:
    """Two groups of two query heads of 3 channels; no adapter on k."""
    torch.manual_seed(0)
    q, v, x = Adapter(12, 4), Adapter(6, 4), torch.randn(5, 1, 4)
    layer = Linear(24, 4)
    base, _ = layer(x)
    _attach(layer, {"q_proj": q, "v_proj": v}, {"q_proj": 6, "k_proj": 3, "v_proj": 3})
    delta = layer(x)[0] - base
    rows_q, rows_v, zero = q(x, False), v(x, False), torch.zeros(5, 1, 3)
    expected = torch.cat(
        (rows_q[..., :6], zero, rows_v[..., :3], rows_q[..., 6:], zero, rows_v[..., 3:]), -1
    )
    torch.testing.assert_close(delta, expected)
    with torch.no_grad():  # into the linear's own output
        assert torch.equal(layer(x)[0], base + delta)


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_dropout_of_an_adapters_input(p: float) -> None:
    """As torch's own dropout and linear, to the bit; two adapters keep one input and two masks."""
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 3, 64, requires_grad=True), torch.randn(2, 7, 3, 8)
    weights = torch.randn(2, 8, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def run(adapter) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = torch.stack([adapter(x, weight) for weight in weights])
        return outputs, *torch.autograd.grad(outputs, (x, weights), upstream)

    ours = run(lambda x, weight: _DroppedLinear.apply(x, weight, p))
    assert sum(kept.values()) == x.numel() * (4 + 2 * 1) + 4 * weights.numel()
    expected = run(lambda x, weight: F.linear(F.dropout(x, p), weight))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    assert float((ours[0] == F.linear(x, weights[0])).float().mean()) < 0.1
