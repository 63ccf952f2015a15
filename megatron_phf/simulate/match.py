"""The ranks' logs against each other: what would hang, or corrupt, on a cluster.  Without torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Of one rank, in order; an operation as events.Operation has it, a dictionary.
Log = Sequence[Mapping[str, Any]]
# Ranks may pass other sizes to it: what is routed to them, a pickled object.
_OWN_SIZES = ("alltoall_base", "alltoall")
_POINT_TO_POINT = ("send", "recv")


def mismatches(logs: Mapping[int, Log]) -> list[str]:
    """Where two of these ranks disagree, with both lines of code; empty: nowhere.

    Operations of one group must come in one order with one shape and dtype; what is sent must be
    received as it is; and no rank may wait for one that waits for it.  Ranks that are not there
    are taken to do what is right.
    """
    found = _collectives(logs) + _messages(logs)
    return found or _circles(logs)


def describe(operation: Mapping[str, Any]) -> str:
    """An operation with its line."""
    size, group = f"{operation['dtype']} {list(operation['shape'])}", operation["group"]
    to = {"send": "to", "recv": "from"}.get(operation["name"])
    end = f"of {group}" if to is None else f"{to} rank {operation['peer']}"
    return f"{operation['name']} {end}, {size}, at {operation['site']}"


def _group(operation: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    return operation["group"], tuple(operation["ranks"])


def _agreed(operation: Mapping[str, Any]) -> tuple:
    """What all ends of an operation must have in common."""
    own = operation["name"] in _OWN_SIZES or (operation["host"] and operation["dtype"] == "uint8")
    shape = () if own else tuple(operation["shape"])
    name = "" if operation["name"] in _POINT_TO_POINT else operation["name"]
    return name, shape, operation["dtype"], operation["host"]


def _compare(first: int, second: int, ours: Log, theirs: Log, what: str) -> list[str]:
    """The first difference of two logs that should go together."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        if _agreed(a) != _agreed(b):
            return [
                f"{what}, operation {number}: rank {first} is in {describe(a)}; "
                f"rank {second} is in {describe(b)}"
            ]
    if len(ours) == len(theirs):
        return []
    rank, other, left = (
        (first, second, ours) if len(ours) > len(theirs) else (second, first, theirs)
    )
    alone = left[min(len(ours), len(theirs))]
    return [f"{what}: rank {rank} is in {describe(alone)}, to which rank {other} never comes"]


def _collectives(logs: Mapping[int, Log]) -> list[str]:
    by_group: dict[tuple, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for rank, log in logs.items():
        for o in log:
            if o["name"] not in _POINT_TO_POINT:
                by_group[_group(o)][rank].append(o)
    found = []
    for (name, ranks), parts in by_group.items():
        here = [rank for rank in ranks if rank in logs]
        for other in here[1:]:
            found += _compare(here[0], other, parts[here[0]], parts[other], name or "a group")
    return found


def _messages(logs: Mapping[int, Log]) -> list[str]:
    sent: dict[tuple, list] = defaultdict(list)
    received: dict[tuple, list] = defaultdict(list)
    for rank, log in logs.items():
        for o in log:
            if o["name"] in _POINT_TO_POINT and o["peer"] in logs:
                ends = (rank, o["peer"]) if o["name"] == "send" else (o["peer"], rank)
                (sent if o["name"] == "send" else received)[*ends, o["group"]].append(o)
    found = []
    for source, target, group in {**sent, **received}:
        key = (source, target, group)
        what = f"messages from rank {source} to {target}"
        found += _compare(source, target, sent[key], received[key], what)
    return found


class _Run:
    """All ranks go on as far as they can; a message is on its way once it is sent."""

    def __init__(self, logs: Mapping[int, Log]) -> None:
        self._logs = logs
        self.at = dict.fromkeys(logs, 0)
        self._reached: Counter[tuple] = Counter()
        self._sent: Counter[tuple] = Counter()
        self._received: Counter[tuple] = Counter()
        self._arrived: dict[int, int] = dict.fromkeys(logs, -1)
        self._posted: dict[int, int | None] = dict.fromkeys(logs)

    def step(self, rank: int) -> bool:
        """Whether ``rank`` could do its next operation."""
        position, log = self.at[rank], self._logs[rank]
        if position == len(log):
            return False
        operation = log[position]
        if self._arrived[rank] < position:
            self._arrived[rank] = position
            self._arrive(rank, operation)
        passes: Callable[..., bool] = {"send": _always, "recv": self._receives}.get(
            operation["name"], self._meets
        )
        if not passes(rank, operation):
            return False
        self.at[rank] += 1
        return True

    def _arrive(self, rank: int, operation: Mapping[str, Any]) -> None:
        if operation["name"] not in _POINT_TO_POINT:
            self._reached[rank, _group(operation)] += 1
        batch = operation["batch"]
        if batch is not None and self._posted[rank] != batch:
            self._posted[rank] = batch
            for o in self._logs[rank][self.at[rank] :]:
                if o["batch"] != batch:
                    break
                self._send(rank, o)
        elif batch is None:
            self._send(rank, operation)

    def _send(self, rank: int, operation: Mapping[str, Any]) -> None:
        if operation["name"] == "send":
            self._sent[rank, operation["peer"], operation["group"]] += 1

    def _receives(self, rank: int, operation: Mapping[str, Any]) -> bool:
        key = (operation["peer"], rank, operation["group"])
        if operation["peer"] in self._logs and self._sent[key] <= self._received[key]:
            return False
        self._received[key] += 1
        return True

    def _meets(self, rank: int, operation: Mapping[str, Any]) -> bool:
        if not operation["blocking"]:
            return True
        group = _group(operation)
        mine = self._reached[rank, group]
        others = (r for r in operation["ranks"] if r in self._logs)
        return all(self._reached[r, group] >= mine for r in others)


def _always(rank: int, operation: Mapping[str, Any]) -> bool:
    return True


def _circles(logs: Mapping[int, Log]) -> list[str]:
    """Ranks that wait for each other, where each group's own order is right."""
    run = _Run(logs)
    while True:
        # A list: every rank goes as far as it can before the next look.
        if not any([_go_on(run, rank) for rank in logs]):
            break
    stuck = {rank: log[run.at[rank]] for rank, log in logs.items() if run.at[rank] < len(log)}
    if not stuck:
        return []
    waits = "; ".join(f"rank {rank} waits in {describe(o)}" for rank, o in stuck.items())
    return [f"these ranks wait for each other: {waits}"]


def _go_on(run: _Run, rank: int) -> bool:
    moved = False
    while run.step(rank):
        moved = True
    return moved
