"""Sampling: the exact filtered distribution, and random numbers that depend on the id alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from megatron_phf.rollout.sampling import SamplingParams, filtered_probabilities, sample, uniforms


def params(**settings) -> SamplingParams:
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 4, "stop_ids": (0,)}
    return SamplingParams(**{**values, "seed": 5, **settings})


LOGITS = torch.tensor([[1.0, 0.2, 2.0, -1.0, 0.5, 1.5, -3.0, 0.0]])


def exact(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The distribution by its definition, one entry at a time."""
    probability = (logits.double() / p.temperature).softmax(-1)
    order = probability.argsort(descending=True).tolist()
    kept = order[: p.top_k or len(order)]
    share = {i: float(probability[i]) for i in kept}
    total, mass, nucleus = sum(share.values()), 0.0, []
    for i in kept:
        if mass >= p.top_p:
            break
        nucleus.append(i)
        mass += share[i] / total
    result = torch.zeros_like(probability)
    result[nucleus] = probability[nucleus]
    return result / result.sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7},
     {"temperature": 0.4, "top_k": 6, "top_p": 0.9}],
)  # fmt: skip
def test_the_sampled_distribution_is_the_filtered_one(settings: dict) -> None:
    p, draws = params(**settings), 20_000
    expected = exact(LOGITS[0], p)
    chosen = sample(LOGITS.expand(draws, -1), uniforms(5, [0], draws)[0], p)
    counts = torch.bincount(chosen, minlength=LOGITS.shape[1]).double()
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    if support.sum() > 1:
        test = stats.chisquare(counts[support], expected[support] * draws)
        assert test.pvalue > 1e-3  # the numbers are fixed: passes always or never


def test_a_wide_nucleus_is_found_in_a_large_vocabulary() -> None:
    """More entries than are looked at first; nothing outside the nucleus, nothing missing."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(2))
    p = params(top_p=0.95, temperature=2.0)
    probabilities, ids = filtered_probabilities(logits, p)
    assert (probabilities > 0).sum(-1).min() > 200
    for row in range(3):
        expected = exact(logits[row], p)
        found = torch.zeros_like(expected)
        found[ids[row]] = probabilities[row].double()
        assert torch.allclose(found / found.sum(), expected, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 3, 60, 10**6])
def test_top_p_of_one_is_off(top_k: int) -> None:
    """Sums of fp32 numbers reach 1 before the end: the tail of 4e-7 is as probable as it was."""
    logits = torch.cat([torch.zeros(1, 3), torch.full((1, 57), -19.0)], -1)
    probabilities, ids = filtered_probabilities(logits, params(top_k=top_k))
    expected = exact(logits[0], params(top_k=top_k))
    found = torch.zeros_like(expected).index_copy(0, ids[0], probabilities[0].double())
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert (found > 0).sum() == (top_k or 60 if top_k < 60 else 60)


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_k": 8, "top_p": 0.9}, {"top_p": 0.9}])
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e40, 1e300])
def test_extreme_temperatures(temperature: float, filters: dict) -> None:
    """The largest logit, or any that the filters leave; never an entry of padding."""
    logits = torch.cat([LOGITS, torch.full((1, 2), -torch.inf)], -1).expand(500, -1)
    chosen = sample(logits, uniforms(5, [0], 500)[0], params(temperature=temperature, **filters))
    if temperature < 1:
        assert set(chosen.tolist()) == {2}
    else:
        most = filters.get("top_k", 8)
        assert len(set(chosen.tolist())) == most and chosen.max() < 8


def test_greedy_and_the_ends_of_the_unit_interval() -> None:
    assert sample(LOGITS, torch.tensor([0.3]), params(temperature=0.0)).tolist() == [2]
    both = sample(LOGITS.expand(2, -1), torch.tensor([0.0, 1 - 1e-16]).double(), params(top_k=3))
    assert both.tolist() == [2, 0]  # the most and the least probable of the three
    ids = filtered_probabilities(LOGITS, params(top_k=3))[1]
    assert ids.tolist() == [[2, 5, 0]]


def test_uniforms_depend_on_seed_and_id_alone() -> None:
    table = uniforms(7, [3, 11, 4], 6)
    assert torch.equal(uniforms(7, [11], 6)[0], table[1])
    assert torch.equal(uniforms(7, [4, 3], 9)[:, :6], table[[2, 0]])
    assert not torch.equal(uniforms(8, [3], 6)[0], table[0])
    assert ((table >= 0) & (table < 1)).all()


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.2}, {"top_k": -1}]
)
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(ValueError, match="--rollout-temperature"):
        params(**bad)
    with pytest.raises(ValueError, match="--max-new-tokens 0"):
        params(max_new_tokens=0)
