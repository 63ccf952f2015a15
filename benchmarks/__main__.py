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

# glibc returns what is freed at once: the peak is what lives, without the heap's holes.
_LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
RESULTS = REPO / "benchmarks" / "results"


def _divergence() -> dict[str, Any]:
    name = "benchmarks.divergence"
    peaks = {
        f"{variant}_{tokens}_chunk_{chunk}": child(
            name, what="memory", variant=variant, tokens=tokens, chunk=chunk
        )["peak_bytes"]
        for variant, tokens, chunk in (
            ("ours", 512, 256),
            ("ours", 2048, 256),
            ("ours", 2048, 64),
            ("whole", 2048, 0),
        )
    }
    sharded = {
        variant: children(2, name, what="memory", variant=variant, tokens=512)["peak_bytes"]
        for variant in ("ours", "whole")
    }
    return {
        **child(name, what="time", tokens=2048, rounds=2),
        "peak_mb": {key: size / 1e6 for key, size in peaks.items()},
        "memory_ratio": peaks["whole_2048_chunk_0"] / peaks["ours_2048_chunk_256"],
        "tensor_parallel_2_512_tokens": {
            **children(2, name, what="time", tokens=512, rounds=2),
            "peak_mb": {key: size / 1e6 for key, size in sharded.items()},
            "memory_ratio": sharded["whole"] / sharded["ours"],
        },
    }


def _rollouts() -> dict[str, Any]:
    return {
        f"{dtype}_{batch}": child("benchmarks.rollouts", dtype=dtype, batch=batch, rounds=3)
        for dtype in ("fp32", "bf16")
        for batch in (1, 8, 32)
    }


def _memory() -> dict[str, Any]:
    deep = {"layers": 8, "response": 448, "batch": 4, "hidden": 512}
    wide = {"layers": 4, "response": 192, "batch": 2, "hidden": 768}
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
    cases: dict[str, tuple[int, dict[str, int], list[str]]] = {
        "deep": (1, deep, []),
        "wide": (1, wide, []),
        "recompute": (1, deep, [*recompute, "--recompute-num-layers", "1"]),
        "lora": (1, deep, ["--lora-rank", "16"]),
        "opsd_alone": (1, deep, ["--phf-alpha", "0"]),
        "tensor_parallel_2": (2, deep, ["--tensor-model-parallel-size", "2"]),
    }
    return {
        name: children(processes, "benchmarks.step", _LIVE, what="memory", **shape, flags=flags)
        for name, (processes, shape, flags) in cases.items()
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
    "packing": lambda: child("benchmarks.packing", rounds=7),
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
