"""L_flow: hand-computed values, every invariance of the method, edge cases, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_phf import reference
from megatron_phf.hidden.term import HiddenTerm, load_term
from megatron_phf.losses import (
    FlowSpec,
    directions,
    flow_loss,
    flow_weights,
    gram,
    relative_layer_map,
    transition_counts,
)

seeds = st.integers(0, 2**31 - 1)
LAYERS, M, H = 3, 6, 5


def hidden(seed: int, batch: int = 2, layers: int = LAYERS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, M, H, generator=generator, dtype=torch.float64) for _ in range(layers)
    ]


def all_valid(batch: int = 2) -> Tensor:
    return torch.ones(batch, M, dtype=torch.bool)


def terms(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Every value of L_flow in one vector."""
    flow = flow_loss(student, teacher, all_valid(student[0].shape[0]))
    return torch.cat((flow.loss[None], *flow.values.values()))


def rotation(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(H, H, generator=generator, dtype=torch.float64))[0]


def rescaled(x: Tensor, factors: Tensor) -> Tensor:
    """The path whose transition i is that of ``x`` times ``factors`` [m-1]."""
    steps = (x[:, 1:] - x[:, :-1]) * factors[:, None]
    return torch.cat((x[:, :1], x[:, :1] + steps.cumsum(1)), dim=1)


def test_value_by_hand() -> None:
    # Student goes right, then up; teacher right, then right: m = 3, two transitions.
    student = [torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 5.0]]])] * 2
    teacher = [torch.tensor([[[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]])] * 2
    flow = flow_loss(student, teacher, torch.ones(1, 3, dtype=torch.bool))
    # cosines 1 and 0; Gram matrices I and all ones: two entries of 1 differ, over 2^2.
    assert flow.values["direction"].tolist() == [0.5, 0.5]
    assert flow.values["geometry"].tolist() == [0.5, 0.5]
    assert flow.values["adjacent"].tolist() == [0.5]
    assert float(flow.loss) == ((0.5 + 0.5) / 2 + 0.5) / 2
    assert [float(flow.mean(name)) for name in flow.values] == [0.5, 0.5, 0.5]


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_equals_reference(seed: int) -> None:
    student, teacher = hidden(seed, batch=1), hidden(seed + 1, batch=1)
    flow = flow_loss(student, teacher, all_valid(1))
    expected = reference.flow_terms([h[0] for h in student], [h[0] for h in teacher])
    for found, wanted in zip(flow.values.values(), expected, strict=True):
        assert torch.allclose(found.float(), torch.stack(wanted).float(), rtol=1e-5, atol=1e-6)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_zero_where_equal(seed: int) -> None:
    assert terms(hidden(seed), hidden(seed)).abs().max() < 1e-12


@given(seeds, st.floats(-100, 100))
@settings(max_examples=25, deadline=None)
def test_a_constant_vector_changes_nothing(seed: int, size: float) -> None:
    student, teacher = hidden(seed), hidden(seed + 1)
    shifts = hidden(seed + 2, batch=1)
    moved = [x + size * shift[:, :1] for x, shift in zip(student, shifts, strict=True)]
    assert torch.allclose(terms(moved, teacher), terms(student, teacher), atol=1e-9)
    moved = [x + size * shift[:, :1] for x, shift in zip(teacher, shifts, strict=True)]
    assert torch.allclose(terms(student, moved), terms(student, teacher), atol=1e-9)


@given(seeds, st.lists(st.floats(1e-3, 1e3), min_size=M - 1, max_size=M - 1))
@settings(max_examples=25, deadline=None)
def test_the_length_of_a_transition_changes_nothing(seed: int, factors: list[float]) -> None:
    student, teacher = hidden(seed), hidden(seed + 1)
    scale = torch.tensor(factors, dtype=torch.float64)
    stretched = [rescaled(x, scale) for x in student]
    assert torch.allclose(terms(stretched, teacher), terms(student, teacher), atol=1e-6)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_geometry_ignores_rotations_direction_only_equal_ones(seed: int) -> None:
    student, teacher = hidden(seed), hidden(seed + 1)
    a, b = rotation(seed + 2), rotation(seed + 3)
    before = flow_loss(student, teacher, all_valid())
    apart = flow_loss([x @ a for x in student], [x @ b for x in teacher], all_valid())
    together = flow_loss([x @ a for x in student], [x @ a for x in teacher], all_valid())
    assert torch.allclose(apart.values["geometry"], before.values["geometry"], atol=1e-9)
    assert not torch.allclose(apart.values["direction"], before.values["direction"], atol=1e-3)
    assert torch.allclose(together.values["direction"], before.values["direction"], atol=1e-9)
    # One map for both layers of a pair leaves the products D_l D_{l+1}^T as they are.
    assert torch.allclose(apart.values["adjacent"], before.values["adjacent"], atol=1e-9)


@pytest.mark.parametrize("tokens", [0, 1])
def test_short_windows_contribute_zero_and_are_counted(tokens: int) -> None:
    student = [x.requires_grad_() for x in hidden(1)]
    valid = all_valid()
    valid[1, tokens:] = False
    flow = flow_loss(student, hidden(2), valid)
    alone = flow_loss([x[:1] for x in student], [x[:1] for x in hidden(2)], valid[:1])
    assert flow.short_sequences == 1
    assert torch.allclose(flow.loss, alone.loss / 2)  # it stays in the mean
    flow.loss.backward()
    assert all(float(x.grad[1].abs().max()) == 0 for x in student)


def test_padding_does_not_matter() -> None:
    student, teacher = hidden(3), hidden(4)
    valid = all_valid()
    valid[1, 4:] = False
    flow = flow_loss(student, teacher, valid)
    cut = [
        flow_loss([x[i : i + 1, :n] for x in student], [x[i : i + 1, :n] for x in teacher],
                  torch.ones(1, n, dtype=torch.bool)).loss
        for i, n in ((0, M), (1, 4))
    ]  # fmt: skip
    assert torch.allclose(flow.loss, sum(cut) / 2)


def test_a_zero_transition_has_direction_zero_and_no_gradient() -> None:
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    x[0, 2] = x[0, 1]
    x.requires_grad_()
    found = directions(x, torch.ones(1, 4, dtype=torch.bool))
    assert found[0, 1].tolist() == [0.0, 0.0, 0.0]
    # In the direction term it counts as the formula has it: 1 - 0.
    assert float(
        load_term("direction").value(found, found, torch.tensor([3])).detach()
    ) == pytest.approx(1 / 3)
    (gradient,) = torch.autograd.grad(found[0, 1].sum(), x, retain_graph=True)
    assert gradient.abs().max() == 0
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_directions_is_autograds(dtype: torch.dtype) -> None:
    """Of the formula as it is written, at invalid ends and zero transitions too."""
    x = torch.randn(2, 9, 16).to(dtype)
    x[0, 4] = x[0, 3]
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    weights = torch.randn(2, 8, 16).to(torch.promote_types(dtype, torch.float32))
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    (directions(ours, valid) * weights).sum().backward()
    wide = plain.to(weights.dtype)
    delta = wide[:, 1:] - wide[:, :-1]
    moving = (valid[:, 1:] & valid[:, :-1] & (delta != 0).any(-1))[..., None]
    norm = torch.where(moving, delta.square().sum(-1, keepdim=True), 1.0).sqrt()
    (torch.where(moving, delta / norm, 0.0) * weights).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)
    x[0, 2] = torch.nan  # both transitions at it have direction 0
    assert directions(x, valid)[0, 1:3].abs().max() == 0


def test_gradients_in_float64() -> None:
    teacher, valid = hidden(6), all_valid()
    valid[1, 3:] = False
    student = tuple(x.requires_grad_() for x in hidden(5))

    def loss(*layers: Tensor) -> Tensor:
        return flow_loss(list(layers), teacher, valid).loss

    assert torch.autograd.gradcheck(loss, student)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = [x.requires_grad_() for x in hidden(6)]
    student = [x.requires_grad_() for x in hidden(5)]
    flow_loss(student, teacher, all_valid()).loss.backward()
    assert all(x.grad is None for x in teacher)


def test_bf16_is_computed_in_fp32() -> None:
    student = [x.to(torch.bfloat16) for x in hidden(7)]
    flow = flow_loss(student, [x.to(torch.bfloat16) for x in hidden(8)], all_valid())
    assert flow.loss.dtype is torch.float32
    exact = flow_loss([x.double() for x in student], [x.to(torch.bfloat16).double()
                      for x in hidden(8)], all_valid())  # fmt: skip
    assert float(flow.loss) == pytest.approx(float(exact.loss), rel=1e-5)


def test_geometry_of_different_hidden_sizes() -> None:
    valid = all_valid(1)
    a = directions(torch.randn(1, M, 4), valid)
    b = directions(torch.randn(1, M, 9), valid)
    counts = transition_counts(valid)
    geometry, adjacent = (load_term(name).value for name in ("geometry", "adjacent"))
    assert geometry(gram(a), gram(b), counts).shape == (1,)
    assert adjacent(a @ a.mT, b @ b.mT, counts) == geometry(gram(a), gram(b), counts)


def other_hidden(seed: int, layers: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, M, width, generator=generator) for _ in range(layers)]


@pytest.mark.parametrize("width", [H, 9, 2])
@pytest.mark.parametrize("layer_map", [None, (1, 1, 4), (2, 3, 5)])
def test_a_teacher_of_other_width_and_depth_equals_the_reference(
    width: int, layer_map: tuple[int, ...] | None
) -> None:
    student = [x.float().requires_grad_() for x in hidden(1, batch=1)]
    teacher = other_hidden(2, layers=5, width=width)
    layers = layer_map or relative_layer_map(LAYERS, 5)
    flow = flow_loss(student, teacher, all_valid(1), layers)
    direction, geometry, adjacent = reference.flow_terms(
        [h[0] for h in student], [h[0] for h in teacher], layer_map
    )
    if width == H:
        assert torch.allclose(flow.values["direction"], torch.stack(direction), atol=1e-6)
        local = (sum(direction) + sum(geometry)) / 2 / LAYERS
    else:
        assert "direction" not in flow.values
        local = sum(geometry) / LAYERS
    assert torch.allclose(flow.values["geometry"], torch.stack(geometry), atol=1e-6)
    assert torch.allclose(flow.values["adjacent"], torch.stack(adjacent), atol=1e-6)
    expected = (local + sum(adjacent) / (LAYERS - 1)) / 2
    assert torch.allclose(flow.loss, expected, atol=1e-6)
    found = torch.autograd.grad(flow.loss, student)
    wanted = torch.autograd.grad(expected, student)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_rotated_and_embedded_teacher_gives_zero() -> None:
    """Geometry and adjacent terms see only inner products: 5 channels inside 9 are the same."""
    student = hidden(3)
    inside = torch.linalg.qr(torch.randn(9, H, dtype=torch.float64)).Q.T
    flow = flow_loss(student, [x @ inside for x in student], all_valid())
    assert float(flow.loss.abs()) < 1e-12
    assert "direction" not in flow.values


def test_layer_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher layer 4: the teacher has layers 1 to 3"):
        flow_loss(hidden(1), hidden(2), all_valid(), (1, 2, 4))
    with pytest.raises(ValueError, match="or a layer_map"):
        flow_loss(hidden(1)[:2], hidden(2), all_valid())


SPECS = {
    "phf": FlowSpec(),
    "direction": FlowSpec(("direction",)),
    "geometry": FlowSpec(("geometry",)),
    "local": FlowSpec(("direction", "geometry"), (2, 3)),
    "first pair": FlowSpec(layers=(1, 2)),
    "no pair": FlowSpec(layers=(1, 3)),
    "adjacent": FlowSpec(("adjacent",)),
    "measured": FlowSpec(("direction=0", "geometry=0", "adjacent")),
    "three local": FlowSpec(("direction", "geometry", "cka")),
    "given": FlowSpec(("direction=0.2", "geometry", "cka=0.3", "adjacent")),
}
WHOLE = {"given": 1.5}


@pytest.mark.parametrize("name", SPECS)
def test_weights_rebuild_the_loss(name: str) -> None:
    spec = SPECS[name]
    flow = flow_loss(hidden(1), hidden(2), all_valid(), spec=spec)
    weights = flow_weights(LAYERS, spec)
    total = sum((x * x.new_tensor(weights[name])).sum() for name, x in flow.values.items())
    assert torch.allclose(flow.loss, total)
    assert [t.split("=")[0] for t in spec.terms] == [*flow.values] == [*weights]
    # Means: the weights of what the loss has in them add up to one, with pairs and without, but
    # for terms whose weight is given.
    assert sum(map(sum, weights.values())) == pytest.approx(WHOLE.get(name, 1.0))


def test_weights_of_one_layer_and_of_another_width() -> None:
    one = flow_weights(1)
    assert one == {"direction": [0.25], "geometry": [0.25], "adjacent": []}
    wide = flow_weights(2, equal_widths=False)
    assert wide == {"geometry": [0.25, 0.25], "adjacent": [0.5]}
    given = flow_weights(4, FlowSpec(("direction=0.5", "geometry", "adjacent=2"), (2, 3)))
    assert given == {
        "direction": [0, 0.25, 0.25, 0], "geometry": [0, 0.5, 0.5, 0], "adjacent": [0, 2, 0],
    }  # fmt: skip
    flow = flow_loss(hidden(1, layers=1), hidden(2, layers=1), all_valid())
    assert len(flow.values["adjacent"]) == 0 and float(flow.mean("adjacent")) == 0


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_cka_equals_the_reference_and_sees_shape_alone(seed: int) -> None:
    """Rotated, moved and scaled states are the same to it, and other widths may be compared."""
    spec = FlowSpec(("cka",))
    student, teacher = hidden(seed, batch=1), other_hidden(seed + 1, LAYERS, 9)
    flow = flow_loss(student, [t.double() for t in teacher], all_valid(1), spec=spec)
    wanted = reference.cka_terms([h[0] for h in student], [h[0] for h in teacher])
    assert torch.allclose(flow.values["cka"].float(), torch.stack(wanted), atol=1e-5)
    moved = [3.0 * x @ rotation(seed + 2) - 7.0 for x in student]
    again = flow_loss(moved, [t.double() for t in teacher], all_valid(1), spec=spec)
    assert torch.allclose(again.values["cka"], flow.values["cka"], atol=1e-9)
    assert float(flow_loss(student, moved, all_valid(1), spec=spec).loss.abs()) < 1e-9


def test_cka_of_rows_that_are_alike_is_zero_without_gradient() -> None:
    student = torch.ones(1, M, H, requires_grad=True)
    flow = flow_loss([student], hidden(2, batch=1, layers=1), all_valid(1), spec=FlowSpec(("cka",)))
    flow.loss.backward()
    assert float(flow.loss.detach()) == 0 and student.grad is not None
    assert float(student.grad.abs().max()) == 0
    large = torch.randn(1, M, H) * 1e7  # the product of both squared norms is beyond fp32
    again = flow_loss([large], [large], all_valid(1), spec=FlowSpec(("cka",)))
    assert float(again.loss) == pytest.approx(0.0, abs=1e-5)


def test_pointwise_matching_sees_what_the_flow_does_not() -> None:
    """A constant added to all of a model's states: the flow is the same, the states are not."""
    spec = FlowSpec(("pointwise",))
    student = hidden(1)
    moved = [x + 3.0 for x in student]
    assert float(flow_loss(student, moved, all_valid()).loss) < 1e-6
    flow = flow_loss(student, moved, all_valid(), spec=spec)
    cosine = torch.nn.functional.cosine_similarity
    expected = sum(1 - cosine(a, b, dim=-1).mean() for a, b in zip(student, moved, strict=True))
    assert float(flow.loss) == pytest.approx(float(expected) / LAYERS)
    assert float(flow.loss) > 0.1
    assert [*flow.values] == ["pointwise"]
    one_position = torch.zeros_like(all_valid())
    one_position[:, 0] = True  # enough for a state, not for a transition
    assert float(flow_loss(student, moved, one_position, spec=spec).loss) > 0


class Halves(HiddenTerm):
    """A term of one's own: the mean square of half the difference."""

    name = "halves"
    states = "rows"
    compares = "states"

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        return ((student - teacher) / 2).square().mean((-1, -2))


class Sideways(Halves):
    """No such states."""

    states = "sideways"


class NoPairs(Halves):
    """A pair has no states of its own."""

    over = "pair"


def test_a_term_of_ones_own() -> None:
    spec = FlowSpec(("tests.unit.hidden.test_flow:Halves=3",))
    flow = flow_loss(hidden(1), hidden(2), all_valid(), spec=spec)
    wanted = sum(((a - b) / 2).square().mean() for a, b in zip(hidden(1), hidden(2), strict=True))
    assert float(flow.loss) == pytest.approx(3 * float(wanted) / LAYERS)
    assert float(flow.mean("halves")) == pytest.approx(float(wanted) / LAYERS)


def test_specs_that_say_nothing_are_refused() -> None:
    here = "tests.unit.hidden.test_flow"
    for values, message in (
        ({"terms": ("direction", "colour")}, "term 'colour': name one of direction, geometry"),
        ({"terms": ()}, "name at least one"),
        ({"terms": ("direction", "direction=2")}, "each once"),
        ({"terms": ("direction=half",)}, "its weight is not a number from 0 on"),
        ({"terms": ("direction=-1",)}, "its weight is not a number from 0 on"),
        ({"terms": ("direction=inf",)}, "its weight is not a number from 0 on"),
        ({"terms": ("nowhere:Term",)}, "cannot be made .ModuleNotFoundError.*PYTHONPATH"),
        ({"terms": (f"{here}:Nothing",)}, "cannot be made .AttributeError"),
        ({"terms": (f"{here}:FlowSpec",)}, "not a megatron_phf.hidden.term.HiddenTerm"),
        ({"terms": (f"{here}:Sideways",)}, "states is 'sideways', not one of transitions, rows"),
        ({"terms": (f"{here}:NoPairs",)}, "a pair of layers has products to compare"),
        ({"layers": (2, 1)}, "layers from 1 on, in order"),
        ({"layers": ()}, "layers from 1 on"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowSpec(**values)
    with pytest.raises(ValueError, match="layer 4: the student has layers 1 to 3"):
        flow_weights(3, FlowSpec(layers=(4,)))
    with pytest.raises(ValueError, match="direction needs a teacher of the student's hidden size"):
        flow_weights(3, FlowSpec(("direction",)), equal_widths=False)


def test_different_numbers_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 student and 3 teacher layers"):
        flow_loss(hidden(1)[:2], hidden(2), all_valid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_transition_of_rounding_is_none(dtype: torch.dtype) -> None:
    """One token repeated has one state: what differs by rounding has no direction."""
    torch.manual_seed(0)
    one = torch.randn(1, 1, 64, dtype=torch.float64) + 3
    eps = torch.finfo(dtype).eps
    noise = torch.rand(1, 5, 64, dtype=torch.float64) - 0.5
    still = (one * (1 + noise * (4 if dtype is not torch.bfloat16 else 0.2) * eps)).to(dtype)
    valid = torch.ones(1, 5, dtype=torch.bool)
    still.requires_grad_()
    found = directions(still, valid)
    assert not found.any()
    found.sum().backward()
    assert not still.grad.any()
    moved = (one * (1 + 300 * eps * noise)).to(dtype)  # small, and none of it rounding
    assert torch.allclose(directions(moved, valid).norm(dim=-1).double(), one.new_ones(()))
