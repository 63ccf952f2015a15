"""Weights of tokens: by hand, in the flow loss's terms, at the window, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_phf import reference
from megatron_phf.config.field import choices_of
from megatron_phf.config.settings import MethodConfig
from megatron_phf.data.batch import flow_window, make_sequences
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden.term import TERMS
from megatron_phf.losses import (
    TOKEN_WEIGHTINGS,
    DivergenceSpec,
    FlowSpec,
    WeightingOptions,
    chunked_divergence,
    chunked_entropy,
    flow_loss,
    token_weights,
)

SCORED = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
VALUES = torch.tensor([[0.3, 0.9, 5.0, 0.9, 0.1], [0.2, 7.0, 7.0, 7.0, 7.0]])


def test_selections_by_hand() -> None:
    """What is not scored is no candidate; of equal ones the first; the mean is one."""
    for name in ("student_entropy", "divergence_top_p"):
        half = token_weights(name, SCORED, VALUES)
        assert half.tolist() == [[0, 2, 0, 2, 0], [1, 0, 0, 0, 0]]
        few = token_weights(name, SCORED, VALUES, WeightingOptions(keep_fraction=0.25))
        assert few.tolist() == [[0, 4, 0, 0, 0], [1, 0, 0, 0, 0]]
        third = token_weights(name, SCORED, VALUES, WeightingOptions(keep_fraction=0.6))
        assert third[0].tolist() == pytest.approx([4 / 3, 4 / 3, 0, 4 / 3, 0])
    tenth = torch.ones(1, 30, dtype=torch.bool)
    kept = token_weights("student_entropy", tenth, torch.rand(1, 30), WeightingOptions(0.1))
    assert int((kept > 0).sum()) == 3


def test_the_others_by_hand() -> None:
    twice = token_weights("teacher_entropy", SCORED, VALUES)
    assert twice.tolist() == [[1, 2, 0, 2, 1], [1, 0, 0, 0, 0]]
    found = token_weights("position", SCORED)
    places = [[1 / 8, 3 / 8, None, 5 / 8, 7 / 8], [0.5] + [None] * 4]
    wanted = [
        [0.0 if u is None else 0.25 + 0.75 / (1 + math.exp(-(u - 0.3) / 0.1)) for u in row]
        for row in places
    ]
    assert torch.allclose(found, torch.tensor(wanted))


def test_what_is_refused() -> None:
    with pytest.raises(KeyError, match="loud"):
        token_weights("loud", SCORED)
    with pytest.raises(AssertionError, match="needs each token's student_entropy"):
        token_weights("student_entropy", SCORED)
    for options in ({"keep_fraction": 0.0}, {"keep_fraction": 1.5}, {"entropy_threshold": -1.0}):
        with pytest.raises(AssertionError, match=next(iter(options))):
            WeightingOptions(**options)
    (flag,) = (f for f in MethodConfig.__dataclass_fields__.values() if f.name == "token_weighting")
    assert choices_of(flag.metadata) == ("none", *TOKEN_WEIGHTINGS)


@pytest.mark.parametrize("name", sorted(TOKEN_WEIGHTINGS))
def test_equal_the_reference(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, head = (torch.randn(n, 4, generator=generator) for n in (9, 11))
    teacher = torch.randn(9, 4, generator=generator)
    pairs = list(zip(rows @ head.T, teacher @ head.T, strict=True))
    o = reference.Options(token_weighting=name, beta=0.5, token_entropy_threshold=1.2)
    spec = DivergenceSpec(beta=0.5, clip_mode="none")
    statistics = {
        "student_entropy": chunked_entropy(rows, head, 1.1, chunk_tokens=4),
        "teacher_entropy": chunked_entropy(teacher, head, 1.1),
        "divergence": chunked_divergence(
            rows, teacher, head, head, torch.ones(9), spec, chunk_tokens=4
        ).per_token,
        None: None,
    }
    values = statistics[TOKEN_WEIGHTINGS[name].statistic]
    options = WeightingOptions(0.5, 1.2)
    scored = torch.ones(1, 9, dtype=torch.bool)
    found = token_weights(name, scored, None if values is None else values[None], options)
    assert found[0].tolist() == pytest.approx(reference.token_weights(pairs, o), rel=1e-5)
    assert len({*found[0].tolist()}) > 1


@pytest.mark.parametrize("weights", [[0.0, 2, 2, 0, 1, 3], [0.0, 0, 2, 0, 0, 0], [0.0] * 6])
@pytest.mark.parametrize("name", TERMS)
def test_every_term_takes_weights_as_the_reference_does(name: str, weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (
        [torch.randn(1, 7, 5, generator=generator) for _ in range(3)] for _ in range(2)
    )
    for x in student:
        x.requires_grad_()
    valid = torch.arange(7)[None] < 6
    w = torch.tensor([*weights, 9.0])  # the last one is not valid
    spec, o = FlowSpec((name,)), reference.Options(terms=name)
    found = flow_loss(student, teacher, valid, spec=spec, token_weights=w[None])
    cut = [x[0, :6] for x in student], [x[0, :6] for x in teacher]
    wanted = torch.stack(reference.weighted_terms(*cut, w[:6], o)[name])
    assert torch.allclose(found.values[name], wanted, rtol=1e-4, atol=1e-6)
    assert bool((wanted > 1e-3).all()) or sum(w > 0 for w in weights) < 2
    ours = torch.autograd.grad(found.loss, student, allow_unused=True, materialize_grads=True)
    if not wanted.requires_grad:
        assert all(float(g.abs().max()) == 0 for g in ours)
        return
    theirs = torch.autograd.grad(wanted.mean(), student, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all() and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_equal_weights_are_none(name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    student, teacher = (
        [torch.randn(2, 6, 5, generator=generator) for _ in range(3)] for _ in range(2)
    )
    valid = torch.arange(6)[None] < torch.tensor([[6], [4]])
    spec = FlowSpec((name,))
    plain = flow_loss(student, teacher, valid, spec=spec)
    same = flow_loss(student, teacher, valid, spec=spec, token_weights=torch.full((2, 6), 0.3))
    assert torch.allclose(same.values[name], plain.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_windows_tokens_have_their_weights(packed: bool) -> None:
    """Behind prompts of other lengths, with tokens that are not the student's, and none at all."""
    rollouts = [
        Rollout((1,), (1, 2, 3), (5, 6, 7, 8)).skipping(1),
        Rollout((1, 2), (1,), (5, 6, 7), response_mask=(True, False, True)),
        Rollout((1, 2, 3), (1,), ()),
    ]
    assert rollouts[0].scored == (False, True, True, True)
    sides = make_sequences(rollouts, [[0, 1, 2]], flow_window(2, "even"), packed=packed)
    values = torch.arange(12.0).view(3, 4)
    for (side,) in sides:
        found = values.gather(1, side.window_tokens()) * side.window_valid
        assert found.tolist() == [[1, 3], [4, 6], [0, 0]]


def test_skipping_none_is_the_same_rollout() -> None:
    rollout = Rollout((1,), (1,), (5, 6))
    assert rollout.skipping(0) is rollout
    assert rollout.skipping(5).scored == (False, False)
