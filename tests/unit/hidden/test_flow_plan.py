"""Teacher layers for student layers, and what pipeline stages record and exchange for them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_phf.hidden.layer_map import check_layer_map, relative_layer_map
from megatron_phf.hidden.plan import FlowPlan, layer_items, make_flow_plan


def test_relative_depth() -> None:
    assert relative_layer_map(4, 4) == (1, 2, 3, 4)
    assert relative_layer_map(4, 8) == (2, 4, 6, 8)
    assert relative_layer_map(28, 36)[:5] == (1, 3, 4, 5, 6)
    assert relative_layer_map(6, 2) == (1, 1, 1, 1, 2, 2)
    assert relative_layer_map(4, 6) == (2, 3, 5, 6)  # 1.5 and 4.5: halves go up


@given(st.integers(1, 80), st.integers(1, 80))
def test_a_relative_map_fits_and_ends_at_the_last_layer(student: int, teacher: int) -> None:
    layers = relative_layer_map(student, teacher)
    check_layer_map(layers, student, teacher)
    assert layers[-1] == teacher


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 2), "2 teacher layers for the student's 3"),
        ((0, 1, 2), "teacher layer 0: the teacher has layers 1 to 5"),
        ((1, 2, 6), "teacher layer 6"),
        ((2, 1, 3), "must not decrease"),
    ],
)
def test_maps_that_do_not_fit(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layer_map(layers, 3, 5)


def cut(layers: int, stages: int, draw) -> list[list[int]]:
    """Layers in order over virtual chunks, chunks in turn over the stages."""
    chunks = stages * draw(st.integers(1, 2))
    ends = sorted(draw(st.lists(st.integers(0, layers), min_size=chunks - 1, max_size=chunks - 1)))
    bounds = itertools.pairwise([0, *ends, layers])
    parts = [list(range(first + 1, last + 1)) for first, last in bounds]
    return [[k for part in parts[stage::stages] for k in part] for stage in range(stages)]


@st.composite
def layouts(draw):
    student, teacher, stages = (draw(st.integers(1, most)) for most in (9, 12, 4))
    numbers = st.lists(st.integers(1, teacher), min_size=student, max_size=student)
    layer_map = tuple(sorted(draw(numbers)))
    return layer_map, cut(student, stages, draw), cut(teacher, stages, draw), draw(st.booleans())


def run(plans: list[FlowPlan], teacher_stages: list[list[int]]) -> list[set]:
    """What every stage has in the end, where nothing comes from nowhere."""
    have: list[set] = []
    for plan, layers in zip(plans, teacher_stages, strict=True):
        assert plan.recorded <= {k for layer in layers for k in (layer - 1, layer)}
        have.append({(k,) for k in plan.recorded})
    for move in plans[0].state_moves:
        assert move.item in have[move.source]
        have[move.target].add(move.item)
    for plan, items in zip(plans, have, strict=True):
        assert all((j,) in items and (k,) in items for j, k in plan.computed)
        items |= set(plan.computed)
    for move in plans[0].moves:
        assert move.item in have[move.source]
        assert move.source != move.target
        have[move.target].add(move.item)
    return have


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_every_stage_gets_what_its_layers_need(layout) -> None:
    layer_map, student, teacher, products = layout
    plans = [
        make_flow_plan(layer_map, student, teacher, stage, products)
        for stage in range(len(student))
    ]
    assert len({(plan.moves, plan.state_moves) for plan in plans}) == 1
    for plan, layers, items in zip(plans, student, run(plans, teacher), strict=True):
        needed = {item for n in layers for item in layer_items(layer_map, n, products)}
        assert needed == plan.wanted
        assert needed <= items


@pytest.mark.parametrize("products", [False, True])
def test_the_students_own_layers_need_no_message(products: bool) -> None:
    stages = [[1, 2, 5, 6], [3, 4, 7, 8]]
    plan = make_flow_plan(range(1, 9), stages, stages, 1, products)
    assert plan.moves == plan.state_moves == ()
    assert plan.recorded == {2, 3, 4, 6, 7, 8}


def test_a_pair_of_layers_that_no_stage_has_both_of() -> None:
    plan = make_flow_plan((1, 3, 6, 8), [[1, 2], [3, 4]], [[1, 2, 3, 4], [5, 6, 7, 8]], 0, True)
    assert [(m.source, m.target, m.item) for m in plan.state_moves] == [(0, 1, (3,))]
    assert plan.moves == ()
