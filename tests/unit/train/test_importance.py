"""Importance weights: the weighted gradient is what the student's own samples would have given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_phf.losses import DivergenceSpec, chunked_divergence
from megatron_phf.runtime import device
from megatron_phf.train import importance
from megatron_phf.train.importance import ImportanceWeights

VOCABULARY, HIDDEN = 7, 5
EVERY = torch.arange(VOCABULARY)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))


def draw(seed: int) -> tuple[Tensor, ...]:
    """Student, sampler and teacher rows [h], and an output weight [v, h], in fp64."""
    torch.manual_seed(seed)
    rows = [torch.randn(HIDDEN, dtype=torch.float64) for _ in range(3)]
    return (*rows, torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64))


def gradient(objective: str, cap: float | None, probabilities: Tensor, known: Tensor) -> Tensor:
    """Of the expected loss, each token sampled by ``probabilities``: enumerated, one row a token.

    ``known``: what the run was told of the tokens' log-probabilities then.
    """
    student, _, teacher, weight = draw(3)
    weight.requires_grad_()
    rows = student.expand(VOCABULARY, -1)
    own = torch.log_softmax(student @ weight.T, 0).detach()
    weights = ImportanceWeights(cap).of(own, known)
    factors = torch.ones(VOCABULARY) if weights is None else weights
    loss = chunked_divergence(
        rows, teacher.expand(VOCABULARY, -1), weight, weight.detach(),
        probabilities * factors.double(), DivergenceSpec(temperature=1.0, clip_mode="none"),
        target_ids=EVERY, objective=objective,
    ).loss  # fmt: skip
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("objective", ["policy_gradient", "jsd"])
def test_the_weighted_gradient_is_unbiased(objective: str) -> None:
    """Samples of another policy, weighted, against the student's own: the whole expectation."""
    student, sampler, _, weight = draw(3)
    logs = [torch.log_softmax(row @ weight.T, 0) for row in (student, sampler)]
    wanted = gradient(objective, None, logs[0].exp(), logs[0])
    found = gradient(objective, 1e9, logs[1].exp(), logs[1])
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)
    other = gradient(objective, None, logs[1].exp(), logs[1])
    if objective == "policy_gradient":  # a divergence of whole distributions knows no sample
        assert (other - wanted).norm() > 0.1 * wanted.norm()


def test_weights_end_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the step's metrics say how many did; each token counts once."""
    monkeypatch.setattr(importance.dist, "all_reduce", lambda sums: None)
    monkeypatch.setattr(importance.parallel, "tensor_parallel_rank", lambda: 0)
    student, sampler = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-3.0, -2.0, -1.0])
    tokens = ImportanceWeights(1.5)
    weights = tokens.of(student, sampler.double())
    assert weights is not None and weights.dtype is torch.float32
    assert weights.tolist() == pytest.approx([1.5, 1.0, 0.1353353])
    found = tokens.take()
    assert found["importance_weight"] == pytest.approx((1.5 + 1.0 + 0.1353353) / 3)
    assert found["importance_clipped_fraction"] == pytest.approx(1 / 3)
    assert tokens.take() == {"importance_weight": 0.0, "importance_clipped_fraction": 0.0}
    assert ImportanceWeights(None).of(student, sampler) is None


def test_rollouts_that_do_not_say_how_they_were_sampled() -> None:
    ImportanceWeights(None).check(0, 4)
    ImportanceWeights(2.0).check(4, 4)
    with pytest.raises(ValueError, match=r"--importance-ratio-cap: 1 of 4 rollouts have no log-pr"):
        ImportanceWeights(2.0).check(3, 4)
