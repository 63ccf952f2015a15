"""Made-up directories of runs, as training writes them, for the tests of the report.

python -m tests.report_runs DIR      # a study of four variants, to look at
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, STEPS, PROBLEMS, K = 6, 40, 24, 4
FINAL = {"opsd": 0.62, "phf": 0.68, "geometry_only": 0.64, "sft": 0.55}
PHASES = {"rollout": 1.3, "teacher": 0.4, "student": 0.9, "optimizer": 0.1}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def flow(rng: np.random.Generator, step: int) -> dict[str, Any]:
    """Terms that fall over the steps and rise over the layers."""
    shape = np.linspace(0.6, 1.4, LAYERS) * (0.2 + 0.8 * np.exp(-step / 15))
    noise = 1 + 0.05 * rng.standard_normal((3, LAYERS))
    direction, geometry = 0.3 * shape * noise[0], 0.02 * shape[::-1] * noise[1]
    adjacent = 0.015 * shape[1:] * noise[2, 1:]
    local = (direction.mean() + geometry.mean()) / 2
    return {
        "flow": (local + adjacent.mean()) / 2,
        "flow_direction": direction.mean(),
        "flow_geometry": geometry.mean(),
        "flow_adjacent": adjacent.mean(),
        "flow_direction_per_layer": direction.tolist(),
        "flow_geometry_per_layer": geometry.tolist(),
        "flow_adjacent_per_pair": adjacent.tolist(),
    }


def no_flow(step: int) -> dict[str, Any]:
    return dict.fromkeys(flow(np.random.default_rng(0), step))


def metrics(rng: np.random.Generator, step: int, with_flow: bool) -> dict[str, Any]:
    """One step's line."""
    flows = flow(rng, step) if with_flow else no_flow(step)
    opsd = 0.4 * np.exp(-step / 20) + 0.05 + 0.02 * rng.standard_normal()
    length = 80 + step + 5 * rng.standard_normal()
    return {
        "step": step,
        "loss": opsd + 0.05 * (flows["flow"] or 0.0),
        "opsd": opsd,
        **flows,
        "grad_norm": 0.5 + 0.1 * rng.random(),
        "learning_rate": 5e-6,
        "clipped_fraction": 0.01 * np.exp(-step / 30),
        "clip_mode": "entry",
        "teacher_entropy": 0.5 + 0.05 * rng.standard_normal(),
        "student_entropy": 0.4 + 0.05 * rng.standard_normal(),
        "teacher_agreement": 0.9 - 0.001 * step,
        "copied_words": 0.3,
        "collapse_signs": {"length": length / 81, "copying": 0.3},
        "rollout_tokens": 3200,
        "rollout_lengths": {"mean": length, "min": 12, "max": 2 * length, "cut": 0.1 / step},
        "seconds": {name: s * (0.9 + 0.2 * rng.random()) for name, s in PHASES.items()},
        "memory_bytes": {name: int(3e9 + 1e9 * i) for i, name in enumerate(PHASES)},
        "tokens_per_second": 1200.0,
        "peak_memory_bytes": 6 * 10**9,
        "nonfinite_steps": 0,
    }


def evaluation(rng: np.random.Generator, step: int, mean: float) -> dict[str, Any]:
    """One evaluation's line."""
    skill = np.clip(mean + 0.25 * rng.standard_normal(PROBLEMS), 0, 1)
    correct = rng.random((PROBLEMS, K)) < skill[:, None]
    samples = [
        {
            "problem": f"What is {i} + {i}, and why?",
            "reference": f"{i} + {i} = {2 * i}: one counts {i} more.\n\\boxed{{{2 * i}}}",
            "answer": str(2 * i),
            "generation": f"After {step} steps I think: {i} and {i} make \\boxed{{{2 * i}}}. " * 5,
            "correct": bool(correct[i, 0]),
        }
        for i in range(3)
    ]
    return {
        "step": step,
        "k": K,
        "problems": PROBLEMS,
        "average_at_k": float(correct.mean()),
        "interval_95": [float(correct.mean()) - 0.05, float(correct.mean()) + 0.05],
        "pass_at_k": float(correct.any(1).mean()),
        "majority_at_k": float((correct.mean(1) > 0.5).mean()),
        "correct": correct.tolist(),
        "seconds": 12.5,
        "samples": samples,
    }


def make_run(
    directory: Path, name: str, seed: int, device: str = "cuda", final: float | None = None
) -> Path:
    """One run's files in ``directory``."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(name)])
    target = FINAL.get(name, 0.6) if final is None else final
    info = {
        "run_name": name,
        "seed": seed,
        "config": {"method": {"phf_alpha": 0.0 if name == "opsd" else 0.05}, "train": {"lr": 5e-6}},
        "world_size": 4,
        "device": device,
        "model": {"num_layers": LAYERS, "hidden_size": 96, "parameters": 312_448},
        "versions": {"torch": "2.13.0"},
        "started": "2026-11-25T01:00:00+00:00",
    }
    (directory / "run.json").write_text(json.dumps(info))
    with_flow = name not in ("opsd", "sft")
    steps = [metrics(rng, i, with_flow) for i in range(1, STEPS + 1)]
    write_lines(directory / "metrics.jsonl", steps)
    points = range(0, STEPS + 1, 10)
    means = [0.35 + (target - 0.35) * (1 - np.exp(-i / 10)) for i in points]
    lines = [evaluation(rng, i, mean) for i, mean in zip(points, means, strict=True)]
    write_lines(directory / "evaluations.jsonl", lines)
    return directory


def make_study(directory: Path, names: tuple[str, ...] = tuple(FINAL), seeds: int = 3) -> Path:
    """``directory/VARIANT/seedN``, as a grid of runs leaves it."""
    for name in names:
        for seed in range(1, seeds + 1):
            make_run(directory / name / f"seed{seed}", name, seed)
    return directory


if __name__ == "__main__":
    make_study(Path(sys.argv[1]))
