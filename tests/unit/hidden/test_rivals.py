"""Terms that PHF is compared with: by hand, against the reference, what each sees, edge cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_phf import reference
from megatron_phf.hidden.term import TERMS, HiddenTerm, load_term
from megatron_phf.losses import FlowSpec, flow_loss

LAYERS, M, H = 3, 6, 5
RIVALS = ("mse", "nmse", "cka_adjacent", "last_layer")


def hidden(seed: int, layers: int = LAYERS, width: int = H) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, M, width, generator=generator) for _ in range(layers)]


def valid(tokens: int = M) -> Tensor:
    return torch.arange(M)[None] < tokens


def value(name: str, student: list[Tensor], teacher: list[Tensor], tokens: int = M) -> Tensor:
    return flow_loss(student, teacher, valid(tokens), spec=FlowSpec((name,))).values[name]


@pytest.mark.parametrize("tokens", [0, 1, 2, M])
@pytest.mark.parametrize("layer_map", [None, (1, 1, 4)])
@pytest.mark.parametrize("name", RIVALS)
def test_equals_reference(name: str, layer_map: tuple[int, ...] | None, tokens: int) -> None:
    student, teacher = [x.requires_grad_() for x in hidden(1)], hidden(2, 5 if layer_map else 3)
    spec, o = FlowSpec((name,)), reference.Options(terms=name, layer_map=layer_map)
    flow = flow_loss(student, teacher, valid(tokens), layer_map, spec)
    cut = [h[0, :tokens] for h in student], [h[0, :tokens] for h in teacher]
    wanted = torch.stack(reference.named_terms(*cut, o)[name])
    assert torch.allclose(flow.values[name], wanted, rtol=1e-5, atol=1e-6)
    assert (tokens > 1) == bool(flow.loss > 0) or (tokens == 1 and name != "cka_adjacent")
    found = torch.autograd.grad(flow.loss, student, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(
        wanted.mean() + 0 * sum(h.sum() for h in student), student, allow_unused=True
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_values_by_hand() -> None:
    student = [torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])] * 2
    teacher = [torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])]
    both = torch.ones(1, 2, dtype=torch.bool)
    spec = FlowSpec(("mse", "nmse", "last_layer"))
    values = flow_loss(student, teacher, both, spec=spec).values
    # Squares of the difference: 4 of 4 entries; 9 + 4 + 1 of them.  The teacher's: 2 and 8.
    assert values["mse"].tolist() == [1.0, 3.5]
    assert values["nmse"].tolist() == [2.0, 1.75]
    # Both layers meet the teacher's second one: across it, then along it.
    assert values["last_layer"].tolist() == [0.5, 0.5]


def test_what_each_sees() -> None:
    """Scale: the squares alone.  A rotation of both layers: not the pairs' products."""
    student, teacher = hidden(1), hidden(2)
    turn = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(3)))[0]
    longer, turned = [3 * x for x in student], [x @ turn for x in student]
    for name in RIVALS:
        before = value(name, student, teacher)
        scaled = torch.allclose(value(name, longer, teacher), before, atol=1e-6)
        assert scaled == (name in ("cka_adjacent", "last_layer"))
        rotated = torch.allclose(value(name, turned, teacher), before, atol=1e-6)
        assert rotated == (name == "cka_adjacent")
    # One scale for all depths: both models' states times 100.
    both = [100 * x for x in student], [100 * x for x in teacher]
    assert torch.allclose(value("nmse", *both), value("nmse", student, teacher))
    assert torch.allclose(value("mse", *both), 1e4 * value("mse", student, teacher), rtol=1e-4)


def test_a_teacher_of_another_width_leaves_out_what_compares_states() -> None:
    flow = flow_loss(hidden(1), hidden(2, width=9), valid(), spec=FlowSpec((*RIVALS, "cka")))
    assert [*flow.values] == ["cka_adjacent", "cka"]
    for name in TERMS:
        assert load_term(name).needs_equal_widths == (load_term(name).compares == "states")


def test_a_teacher_that_is_zero_has_no_relative_distance() -> None:
    student = [x.requires_grad_() for x in hidden(1, layers=1)]
    flow = flow_loss(student, [torch.zeros(1, M, H)], valid(), spec=FlowSpec(("nmse",)))
    flow.loss.backward()
    assert float(flow.loss.detach()) == 0 and float(student[0].grad.abs().max()) == 0


class Pairs(HiddenTerm):
    """Neighbouring layers against one layer."""

    name = "pairs"
    over = "pair"
    against = "last"


def test_no_pair_against_one_layer() -> None:
    with pytest.raises(ValueError, match="one layer of the teacher is no pair"):
        FlowSpec(("tests.unit.hidden.test_rivals:Pairs",))
