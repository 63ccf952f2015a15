"""All benchmarks, each in processes of its own: a table and JSON under benchmarks/results/.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.fits import polynomial
from benchmarks.harness import REPO, Spread, child, children, ratio

RESULTS = REPO / "benchmarks" / "results"


def _divergence() -> dict[str, Any]:
    memory = {
        f"{variant}_{tokens}": child(
            "benchmarks.divergence", what="memory", variant=variant, tokens=tokens, chunk=64
        )["peak_bytes"]
        for variant, tokens in (("ours", 512), ("ours", 2048), ("whole", 2048))
    }
    found = child("benchmarks.divergence", what="time", tokens=256, rounds=3)
    sharded = children(2, "benchmarks.divergence", what="sharded", tokens=128, rounds=1)
    return {
        **found,
        "peak_mib": {name: size / 2**20 for name, size in memory.items()},
        "memory_ratio": memory["whole_2048"] / memory["ours_2048"],
        "tensor_parallel_2": sharded,
    }


def _rollouts() -> dict[str, Any]:
    return {
        f"{dtype}_{batch}": child("benchmarks.rollouts", dtype=dtype, batch=batch, rounds=3)
        for dtype in ("fp32", "bf16")
        for batch in (1, 8, 32)
    }


def _memory() -> dict[str, Any]:
    shapes = {"deep": (8, 448, 4, 512), "wide": (4, 192, 2, 768)}
    names = ("layers", "response", "batch", "hidden")
    return {
        name: child("benchmarks.step", what="memory", **dict(zip(names, shape, strict=True)))
        for name, shape in shapes.items()
    }


PEERS = ("ours", "ours_phf", "official_plain", "official")


def _peer(lora_rank: int, *variants: str) -> dict[str, Any]:
    return child(
        "benchmarks.peer", what="time", lora_rank=lora_rank, rounds=3, variants=variants or PEERS
    )


def _peer_memory() -> dict[str, Any]:
    both = ("ours", "official")
    kinds = {"lora_64": (64, 64, PEERS), "lora_256": (64, 256, both), "all_64": (0, 64, both)}
    return {
        kind: {
            name: child("benchmarks.peer", what="memory", variant=name, lora_rank=rank, new=new)
            for name in names
        }
        for kind, (rank, new, names) in kinds.items()
    }


def _processes(launches: int = 3) -> dict[str, Any]:
    """Seconds of one process over those of two, launches in turns."""
    layouts = {"one": (1, 1), "data_parallel_2": (2, 1), "tensor_parallel_2": (2, 2)}
    times: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(launches):
        for name, (number, split) in layouts.items():
            found = children(
                number, "benchmarks.scaling", axis="processes", rounds=3, tensor_parallel=split
            )
            times[name].append(found["seconds"])
    return {
        "weak_efficiency": ratio(times["one"], times["data_parallel_2"]).as_json(),
        "tensor_parallel_speedup": ratio(times["one"], times["tensor_parallel_2"]).as_json(),
        "seconds": {name: Spread.of(values).as_json() for name, values in times.items()},
    }


def _scaling() -> dict[str, Any]:
    peaks = {
        n: child("benchmarks.scaling", axis="memory", response=n)["peak_bytes"]
        for n in (256, 512, 1024)
    }
    return {
        **{
            axis: child("benchmarks.scaling", axis=axis, rounds=3)
            for axis in ("response", "layers", "window")
        },
        "memory": {
            "peak_mib": {str(n): peak / 2**20 for n, peak in peaks.items()},
            "polynomial": polynomial(list(peaks), list(peaks.values()), 1),
        },
    }


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "startup": lambda: {
        **child("benchmarks.startup", what="answer", rounds=5),
        **child("benchmarks.startup", what="first_step", rounds=3),
    },
    "phf_price": lambda: child("benchmarks.step", what="phf_price", rounds=5),
    "memory": _memory,
    "rollouts": _rollouts,
    "divergence": _divergence,
    "scaling": _scaling,
    "scaling_processes": _processes,
    "peer_lora": lambda: _peer(64),
    "peer_all_weights": lambda: _peer(0),
    "peer_one_microbatch": lambda: _peer(64, "ours", "official_whole"),
    "peer_memory": _peer_memory,
}


def flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """(name, number) of every leaf; a spread is one."""
    if isinstance(value, dict) and value.keys() == {"median", "low", "high"}:
        return [(prefix, f"{value['median']:.4g} [{value['low']:.4g}, {value['high']:.4g}]")]
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in flat(f"{prefix}.{k}", v)]
    return [(prefix, f"{value:.4g}" if isinstance(value, float) else str(value))]


def main(names: list[str]) -> None:
    """Run ``names`` (all without any) and write each one's results."""
    RESULTS.mkdir(exist_ok=True)
    for name in names or BENCHMARKS:
        found = BENCHMARKS[name]()
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(*(f"{key:<60} {number}" for key, number in flat(name, found)), sep="\n", flush=True)
    rows = ["| figure | median [quartiles] |", "|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        rows += [f"| {k} | {v} |" for k, v in flat(path.stem, json.loads(path.read_text()))]
    (RESULTS / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
