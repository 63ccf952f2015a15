"""The teacher's side of the flow loss: recorded layer by layer, then brought to where it is needed.

States take n h_T numbers a sequence and teacher layer, products S S'^T of two layers n^2.  Where no
term compares states themselves products are enough, and :class:`FlowTargets` keeps them instead
where they are smaller; states are then dropped as soon as their products exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_phf.hidden.plan import FlowPlan, Item, Move
from megatron_phf.hidden.rows import RowPlaces
from megatron_phf.hidden.term import StateKind
from megatron_phf.runtime import device, parallel


@dataclass(frozen=True)
class FlowWindow:
    """The window of one microbatch in the sequences of one model.

    ``places`` [b, m]: of the window's tokens; ``valid`` bool [b, m]: False where a shorter window
    is padded; ``gradient_scale``: what one sequence's L_flow is multiplied with in the training
    objective; ``weights`` [b, m]: of the tokens, None where all count the same.
    """

    places: RowPlaces
    valid: Tensor
    gradient_scale: float
    weights: Tensor | None = None


# What is compared: a term's ``against`` and the name of its kind of states.
TargetKey = tuple[str, str]


class FlowTargets:
    """States of one kind that the student's layers of this stage compare with.

    Keyed by (microbatch, item); fp32, detached.  One step: ``start``, ``record`` by the teacher's
    layers, ``exchange``, ``states`` and ``products`` by the student's, ``clear``.
    """

    def __init__(self, plan: FlowPlan, kind: StateKind, hidden_size: int) -> None:
        """``hidden_size``: the teacher's."""
        self._plan, self._kind, self._width = plan, kind, kind.width(hidden_size)
        self._sizes: list[tuple[int, int]] = []  # (b, n) of each microbatch
        self._items: dict[tuple[int, Item], Tensor] = {}
        self._seen: set[tuple[int, int]] = set()

    def start(self, windows: Sequence[FlowWindow]) -> None:
        """A step begins, whose microbatches have these windows."""
        self.clear()
        shapes = [window.valid.shape for window in windows]
        self._sizes = [(b, self._kind.rows(positions)) for b, positions in shapes]

    def clear(self) -> None:
        """Forget everything."""
        self._sizes, self._items, self._seen = [], {}, set()

    def wants(self, microbatch: int, layer: int) -> bool:
        """Whether teacher layer ``layer`` is still to be recorded (0: the embedding, never)."""
        return layer in self._plan.recorded and (microbatch, layer) not in self._seen

    def record(self, microbatch: int, layer: int, states: Tensor) -> None:
        """states [b, n, h_T] of teacher layer ``layer``."""
        self._seen.add((microbatch, layer))
        self._items[microbatch, (layer,)] = states
        if self._plan.products:
            sent = {move.item for move in self._plan.state_moves}
            self._multiply(microbatch, kept=sent)

    def exchange(self) -> None:
        """After the teacher's pass: every stage gets what it lacks; collective over the pipeline.

        An item travels as fp32 once to each stage that lacks it: 4 b n h_T bytes, or 4 b n^2 as
        products.
        """
        self._transfer(self._plan.state_moves)
        if self._plan.products:
            for microbatch in range(len(self._sizes)):
                self._multiply(microbatch, kept=set())
        self._transfer(self._plan.moves)
        self._items = {key: x for key, x in self._items.items() if key[1] in self._plan.wanted}

    def states(self, microbatch: int, layer: int) -> Tensor:
        """[b, n, h_T] for student layer ``layer``; not in products mode."""
        return self._items[microbatch, (self._plan.layer_map[layer - 1],)]

    def products(self, microbatch: int, first: int, second: int) -> Tensor:
        """S_j S_k^T [b, n, n], j and k the teacher's for two student layers."""
        j, k = (self._plan.layer_map[layer - 1] for layer in (first, second))
        if self._plan.products:
            return self._items[microbatch, (j, k)]
        return self._items[microbatch, (j,)] @ self._items[microbatch, (k,)].mT

    def _multiply(self, microbatch: int, kept: set[Item]) -> None:
        """Make the products that are possible now; drop states without a further use."""
        pending: set[Item] = set()
        for j, k in self._plan.computed:
            first, second = (self._items.get((microbatch, (x,))) for x in (j, k))
            if (microbatch, (j, k)) in self._items:
                continue
            if first is None or second is None:
                pending |= {(j,), (k,)}
            else:
                self._items[microbatch, (j, k)] = first @ second.mT
        for number, item in list(self._items):
            if number == microbatch and len(item) == 1 and item not in kept | pending:
                del self._items[number, item]

    def _shape(self, microbatch: int, item: Item) -> tuple[int, int, int]:
        b, n = self._sizes[microbatch]
        return b, n, (self._width if len(item) == 1 else n)

    def _transfer(self, moves: Sequence[Move]) -> None:
        """One message between each two stages: all items of all microbatches, in order."""
        stage, numbers = self._plan.stage, range(len(self._sizes))
        sends: dict[int, list[Tensor]] = {}
        expected: dict[int, list[tuple[int, Item]]] = {}
        for move in moves:
            if move.source == stage:
                parts = [self._items[i, move.item].flatten() for i in numbers]
                sends.setdefault(move.target, []).extend(parts)
            if move.target == stage:
                expected.setdefault(move.source, []).extend((i, move.item) for i in numbers)
        received = parallel.exchange_between_stages(
            {target: torch.cat(parts) for target, parts in sends.items()},
            {
                source: torch.empty(self._numbers(keys), device=device.device())
                for source, keys in expected.items()
            },
        )
        for source, keys in expected.items():
            sizes = [self._numbers([key]) for key in keys]
            for key, part in zip(keys, received[source].split(sizes), strict=True):
                self._items[key] = part.view(self._shape(*key))

    def _numbers(self, keys: Sequence[tuple[int, Item]]) -> int:
        return sum(torch.Size(self._shape(*key)).numel() for key in keys)
