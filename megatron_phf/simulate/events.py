"""What a simulated rank does that costs or breaks on a cluster: by phase and by line of code."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_OWN, _CORE = "/megatron_phf/", "/megatron/core/"
_SIMULATION = "/megatron_phf/simulate/"


@dataclass(frozen=True)
class Operation:
    """One collective or point-to-point operation.

    ``ranks``: global ones of the group; ``peer``: the other end's global rank of a send or
    receive; ``batch``: number of the group of operations that were posted together; ``host``:
    whether its tensors are in host memory.
    """

    phase: str
    name: str
    group: str
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    site: str
    host: bool = False
    blocking: bool = True
    peer: int | None = None
    batch: int | None = None


@dataclass
class Events:
    """Counters of one rank; ``phase`` is the current one.

    ``syncs`` and ``made_up`` are by (phase, kind, line): the host waits for the device; a value
    that only a device could know was needed on the host, and was made up.  ``refused``: what CUDA
    would not take, or nobody should do.
    """

    phase: str = "build"
    syncs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    made_up: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    operations: list[Operation] = field(default_factory=list)
    batch: int | None = None
    count: int = 0

    def sync(self, kind: str) -> None:
        """The host waits for the device here."""
        self.syncs[self.phase, kind, call_site()] += 1

    def make_up(self, kind: str) -> None:
        """A value is needed here that nobody knows."""
        self.made_up[self.phase, kind, call_site()] += 1

    def refuse(self, what: str) -> None:
        """CUDA would not do it."""
        self.refused[self.phase, what, call_site()] += 1

    def forget(self) -> None:
        """Count from here on; what was refused stays."""
        self.syncs.clear()
        self.made_up.clear()
        self.operations.clear()


def short_name(path: str) -> str | None:
    """A source file as reports name it; None where it is neither the product's nor megatron's."""
    if _SIMULATION in path:
        return None
    if _OWN in path:
        return path.rsplit(_OWN, 1)[1]
    return f"megatron/{path.rsplit(_CORE, 1)[1]}" if _CORE in path else None


def call_site(frame: Any = None) -> str:
    """The innermost line of the product, with the line of megatron-core that it went through."""
    frame, core = frame or sys._getframe(1), None
    while frame is not None:
        name = short_name(frame.f_code.co_filename)
        if name is not None:
            line = f"{name}:{frame.f_lineno}"
            if not name.startswith("megatron/"):
                return line if core is None else f"{line} <- {core}"
            core = core or line
        frame = frame.f_back
    return core or "?"
