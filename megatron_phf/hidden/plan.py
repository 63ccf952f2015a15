"""What each pipeline stage records of the teacher, and what stages hand to each other.

Student layer l is compared with teacher layer k = map(l), and the pair (l-1, l) with the teacher's
(map(l-1), map(l)).  The two models may be cut into stages at other places.  A stage has the
states of its teacher layers and of its first layer's input; whatever else its student layers
need comes from the stage that has it.  For a teacher with the student's own layers, nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# (k,): states of teacher layer k, [b, n, h_T], for example its n = m - 1 unit transitions.
# (j, k): their products S_j S_k^T, [b, n, n].
Item = tuple[int, ...]
Stages = Sequence[Sequence[int]]


@dataclass(frozen=True, order=True)
class Move:
    """``item`` goes from stage ``source`` to stage ``target``."""

    source: int
    target: int
    item: Item


@dataclass(frozen=True)
class FlowPlan:
    """One stage's part in it; the moves are those of all stages, the same everywhere.

    ``recorded``: teacher layers whose states are taken here; ``computed``: products made of
    them here (in products mode); ``wanted``: what the student's layers here compare with.
    ``state_moves`` come before the products are complete, ``moves`` after.
    """

    stage: int
    layer_map: tuple[int, ...]
    products: bool
    recorded: frozenset[int]
    computed: tuple[Item, ...]
    wanted: frozenset[Item]
    state_moves: tuple[Move, ...]
    moves: tuple[Move, ...]


def layer_items(
    layer_map: Sequence[int], layer: int, products: bool, pairs: bool = True
) -> list[Item]:
    """What student layer ``layer`` (1-based) compares with, the layer before it too for pairs."""
    own = layer_map[layer - 1]
    before = [layer_map[layer - 2]] if pairs and layer > 1 else []
    if products:
        return [(own, own), *((k, own) for k in before)]
    return [(k,) for k in (own, *before)]


def make_flow_plan(
    layer_map: Sequence[int],
    student_stages: Stages,
    teacher_stages: Stages,
    stage: int,
    products: bool,
    pairs: bool = True,
) -> FlowPlan:
    """The plan of ``stage`` for one kind of states.

    Args:
        student_stages, teacher_stages: the (1-based, global) numbers of each stage's layers, those
            of all its virtual stages together.
        products: keep products instead of states: n^2 numbers instead of n h_T.
        pairs: whether a term relates neighbouring layers.
    """
    held = [{k for layer in layers for k in (layer - 1, layer) if k} for layers in teacher_stages]
    owner = {k: stage for stage, layers in enumerate(teacher_stages) for k in layers}
    needs = [
        {item for layer in layers for item in layer_items(layer_map, layer, products, pairs)}
        for layers in student_stages
    ]
    moves, state_moves = set(), set()
    computed: list[set[Item]] = [set() for _ in held]
    for target, items in enumerate(needs):
        for item in items:
            home = _home(item, target, held, owner)
            if home != target:
                moves.add(Move(home, target, item))
            if products:
                computed[home].add(item)
                missing = set(item) - held[home]
                state_moves |= {Move(owner[k], home, (k,)) for k in missing}
    own = computed[stage] if products else needs[stage]
    sent = {m.item for m in (*moves, *state_moves) if m.source == stage and len(m.item) == 1}
    recorded = {k for item in (*own, *sent) for k in item} & held[stage]
    return FlowPlan(
        stage,
        tuple(layer_map),
        products,
        frozenset(recorded),
        tuple(sorted(computed[stage])),
        frozenset(needs[stage]),
        tuple(sorted(state_moves)),
        tuple(sorted(moves)),
    )


def _home(item: Item, target: int, held: Sequence[set[int]], owner: dict[int, int]) -> int:
    """The stage that makes ``item`` for ``target``: itself if it can, else one that can."""
    able = [stage for stage, layers in enumerate(held) if layers.issuperset(item)]
    if target in able:
        return target
    # Products of layers that no stage has both of are made where the later one is.
    return able[0] if able else owner[item[-1]]
