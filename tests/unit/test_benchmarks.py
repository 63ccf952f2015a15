"""The benchmarks' own arithmetic: fitted laws, and the official trainer's divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.fits import polynomial, power_law
from benchmarks.official import Settings, divergence
from megatron_phf.losses import DivergenceSpec, chunked_divergence

SIZES = [16.0, 32.0, 64.0, 256.0]


def test_power_law_finds_its_exponent() -> None:
    found = power_law(SIZES, [3 * x**1.7 for x in SIZES])
    assert found["exponent"] == pytest.approx(1.7)
    assert found["r2"] == pytest.approx(1.0)


def test_polynomial_says_what_each_term_is_at_the_largest_size() -> None:
    found = polynomial(SIZES, [256 * (2 + 5 * (x / 256) + 3 * (x / 256) ** 2) for x in SIZES], 2)
    shares = [found[f"{name}_share"] for name in ("constant", "linear", "quadratic")]
    np.testing.assert_allclose(shares, [0.2, 0.5, 0.3], atol=1e-9)


def test_a_law_that_does_not_hold_has_a_low_r2() -> None:
    assert power_law(SIZES, [1.0, 5.0, 5.0, 1.0])["r2"] < 0.5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_official_divergence_is_the_products(beta: float) -> None:
    """Value and gradient in the student's rows, with entries that the clamp cuts."""
    torch.manual_seed(0)
    head, teacher = torch.randn(50, 8), torch.randn(6, 8)
    ours, theirs = (torch.randn(6, 8).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    spec = DivergenceSpec(beta=beta, temperature=1.1, clip_mode="entry", clip=0.05)
    found = chunked_divergence(ours, teacher, head, head, torch.full((6,), 1 / 6), spec)
    assert found.clipped.max() > 0
    found.loss.backward()
    logits = (x.view(2, 3, 8) @ head.T for x in (theirs, teacher))
    expected = divergence(*logits, Settings(beta=beta))
    expected.backward()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
