"""What ``python -m benchmarks`` measures, each in processes of its own: ``ALL`` and ``QUICK``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.fits import polynomial
from benchmarks.harness import Spread, child, children, ratio

# glibc returns what is freed at once: the peak is what lives, without the heap's holes.
_LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def _compared(peaks: dict[str, int]) -> dict[str, Any]:
    """``peaks`` in bytes, the last two ours and that of all logits at once."""
    *_, ours, whole = peaks.values()
    return {
        "peak_mb": {key: size / 1e6 for key, size in peaks.items()},
        "memory_ratio": whole / ours,
    }


def _divergence_peaks(*cases: tuple[str, int, int]) -> dict[str, Any]:
    """Of (variant, tokens, chunk), compared."""
    peaks = {
        f"{variant}_{tokens}_chunk_{chunk}": child(
            "benchmarks.divergence",
            _LIVE,
            what="memory",
            variant=variant,
            tokens=tokens,
            chunk=chunk,
        )["peak_bytes"]
        for variant, tokens, chunk in cases
    }
    return _compared(peaks)


def _divergence() -> dict[str, Any]:
    name = "benchmarks.divergence"
    sharded = {
        variant: children(2, name, _LIVE, what="memory", variant=variant, tokens=512)["peak_bytes"]
        for variant in ("ours", "whole")
    }
    return {
        **child(name, what="time", tokens=2048, rounds=2),
        **_divergence_peaks(
            ("ours", 512, 256), ("ours", 2048, 64), ("ours", 2048, 256), ("whole", 2048, 0)
        ),
        "tensor_parallel_2_512_tokens": {
            **children(2, name, what="time", tokens=512, rounds=2),
            **_compared(sharded),
        },
    }


def _rollouts(*batches: int) -> dict[str, Any]:
    return {
        f"{dtype}_{batch}": child("benchmarks.rollouts", dtype=dtype, batch=batch, rounds=3)
        for dtype in ("fp32", "bf16")
        for batch in batches
    }


def _memory(*chosen: str) -> dict[str, Any]:
    """The cases of these names; without any, all."""
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
        if name in (chosen or cases)
    }


PEERS = ("ours", "ours_phf", "official_plain", "official")
BOTH = ("ours", "official")


def _peer(lora_rank: int, rounds: int, variants: tuple[str, ...]) -> dict[str, Any]:
    return child(
        "benchmarks.peer", what="time", lora_rank=lora_rank, rounds=rounds, variants=variants
    )


def _peer_memory(*kinds: tuple[int, int, tuple[str, ...]]) -> dict[str, Any]:
    """Peaks of (LoRA rank, new tokens, variants); ours over the official one's."""
    found = {}
    for rank, new, names in kinds:
        peaks = {
            name: child("benchmarks.peer", what="memory", variant=name, lora_rank=rank, new=new)
            for name in names
        }
        ours, theirs = (peaks[name]["steps_peak_mib"] for name in BOTH)
        kind = f"{'lora' if rank else 'all'}_{new}"
        found[kind] = {**peaks, "steps_peak_ratio": ours / theirs}
    return found


def _processes(launches: int) -> dict[str, Any]:
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


Suite = dict[str, Callable[[], dict[str, Any]]]

ALL: Suite = {
    "startup": lambda: {
        **child("benchmarks.startup", what="answer", rounds=5),
        **child("benchmarks.startup", what="first_step", rounds=3),
    },
    "phf_price": lambda: child("benchmarks.step", what="phf_price", rounds=25),
    "packing": lambda: child("benchmarks.packing", rounds=7),
    "overlap": lambda: {
        f"rollouts_{n}x": child("benchmarks.overlap", ratio=n, steps=30) for n in (3, 1)
    },
    "memory": _memory,
    "rollouts": lambda: _rollouts(1, 8, 32),
    "divergence": _divergence,
    "scaling": _scaling,
    "scaling_processes": lambda: _processes(3),
    "peer_lora": lambda: _peer(64, 3, PEERS),
    "peer_all_weights": lambda: _peer(0, 3, PEERS),
    "peer_one_microbatch": lambda: _peer(64, 3, ("ours", "official_whole")),
    "peer_memory": lambda: _peer_memory(
        (64, 64, PEERS), (64, 256, BOTH), (0, 64, BOTH), (0, 256, BOTH)
    ),
}

# One figure of each kind, fewer rounds.
QUICK: Suite = {
    "startup": lambda: child("benchmarks.startup", what="answer", rounds=5),
    "phf_price": lambda: child("benchmarks.step", what="phf_price", rounds=3),
    "packing": lambda: child("benchmarks.packing", rounds=3),
    "overlap": lambda: {"rollouts_3x": child("benchmarks.overlap", ratio=3, steps=6)},
    "memory": lambda: _memory("deep", "tensor_parallel_2"),
    "rollouts": lambda: _rollouts(8),
    "divergence": lambda: {
        **child("benchmarks.divergence", what="time", tokens=512, rounds=2),
        **_divergence_peaks(("ours", 2048, 256), ("whole", 2048, 0)),
    },
    "scaling_processes": lambda: _processes(1),
    "peer_lora": lambda: _peer(64, 1, BOTH),
    "peer_memory": lambda: _peer_memory((64, 256, BOTH)),
}
