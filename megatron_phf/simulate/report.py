"""A simulated rank's numbers as text.  Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_GIB = 2**30
_HOLDERS = (
    "weights", "gradients", "optimizer", "teacher", "targets", "activations", "output loss",
    "KV cache",
)  # fmt: skip
_MOST = 40  # lines of one table


def peak(result: Mapping[str, Any]) -> int:
    """Bytes of device tensors at most, of all phases."""
    return max((m["bytes"] for m in result["memory"].values()), default=0)


def formula(result: Mapping[str, Any]) -> float:
    """Bytes by formula at the peak of the phases that were simulated."""
    phases = result["formula"].values()
    return max((sum(parts.values()) * _GIB for parts in phases), default=0.0)


def synchronisations(result: Mapping[str, Any]) -> int:
    """How often the host waits for the device in a step."""
    return sum(n for *_, n in result["syncs"])


def describe(result: Mapping[str, Any], world: int) -> str:
    """All tables of one rank."""
    places = (f"{name} {i}/{n}" for name, (i, n) in result["place"].items() if n > 1)
    head = f"rank {result['rank']} of {world}  {' '.join(places)}".rstrip()
    if "seconds" in result:
        head += f"  ({result['seconds']:.0f} s, {result['operations run']} operations)"
    parts = [head, *_memory(result), *_communication(result), *_syncs(result), *_refused(result)]
    return "\n".join(parts)


def _memory(result: Mapping[str, Any]) -> list[str]:
    if not result["memory"]:
        return []
    small = peak(result) < _GIB
    unit = 2**20 if small else _GIB
    rows: list[tuple[str, ...]] = [("MiB at most" if small else "GiB at most", "all", *_HOLDERS)]
    for phase, m in result["memory"].items():
        sizes = [size / unit for size in (m["bytes"], *_in_order(m["held"]))]
        rows.append((phase, *(f"{size:.2f}" for size in sizes)))
    for phase, parts in result.get("formula", {}).items():
        sizes = [size * _GIB / unit for size in (sum(parts.values()), *_in_order(parts))]
        rows.append((f"formula: {phase}", *(f"{size:.2f}" for size in sizes)))
    return _table(rows)


def _in_order(parts: Mapping[str, float]) -> list[float]:
    return [parts.get(holder, 0.0) for holder in _HOLDERS]


def _communication(result: Mapping[str, Any]) -> list[str]:
    found = result.get("communication", [])
    rows: list[tuple[str, ...]] = [
        ("a step's communication", "phase", "group", "ranks", "number", "MB")
    ]
    for phase, name, group, size, host, number, moved in found[:_MOST]:
        where = f"{name} (host)" if host else name
        rows.append((where, phase, group.lower(), str(size), str(number), f"{moved / 1e6:.3f}"))
    return _table(rows) if found else []


def _syncs(result: Mapping[str, Any]) -> list[str]:
    lines: Counter[tuple[str, str]] = Counter()
    for _, kind, site, number in result["syncs"]:
        lines[site, kind] += number
    total = synchronisations(result)
    found = [f"host-device synchronisations a step: {total}"]
    found += [f"  {n:6}  {site}  ({kind})" for (site, kind), n in lines.most_common(_MOST)]
    return found


def _refused(result: Mapping[str, Any]) -> list[str]:
    return [
        f"error: {phase}: {what} ({site}" + (f", {n} times)" if n > 1 else ")")
        for phase, what, site, n in result["refused"]
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [i < 3 and not rows[1][i].replace(".", "").isdigit() for i in range(len(widths))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]
