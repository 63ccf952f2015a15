"""Run a study: every arm on every base model with every seed; what has run is not run again.

    python -m benchmarks.study rates two --output-dir runs/study

Each run leaves files as the training job's (OUTPUT/TASK/ARM/...), which tools/report.py reads;
``python -m benchmarks.study.tables rates OUTPUT/TASK`` compares them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.bases import warm_start
from benchmarks.study.studies import BASES, STUDIES, Study
from benchmarks.study.task import TASKS, Problems
from benchmarks.study.train import Arm, Curve, Lockstep
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.files.replace import write_json

_TRAINING, _HELDOUT = 3000, 200  # problems
_LEVEL = 0.3  # of the held-out problems solved: the base models


def _bases(path: Path, train: Problems, heldout: Problems) -> Tensor:
    """The base models of a task, made once."""
    if not path.is_file():
        rows, known = warm_start(MODEL_CONFIG, train, heldout, _LEVEL, BASES)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((rows, known), path)
    rows, known = torch.load(path)
    for i, (steps, part) in enumerate(known):
        print(f"base {i}: {100 * part:.1f} % after {steps} steps", flush=True)
    return rows


def _write(directory: Path, name: str, curve: Curve) -> None:
    """A run's files, run.json last."""
    directory.mkdir(parents=True, exist_ok=True)
    evaluations: list[dict[str, Any]] = [
        {
            "step": step,
            "k": 1,
            "average_at_k": sum(right) / len(right),
            "correct": [[good] for good in right],
        }
        for step, right in curve.correct.items()
    ]
    for kind, lines in (("metrics", curve.metrics), ("evaluations", evaluations)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{kind}.jsonl").write_text(text)
    known = {"run_name": name, "seed": 10 * curve.run.base + curve.run.seed}
    write_json(str(directory / "run.json"), {**known, "device": "cpu", "world_size": 1})


def _run_arm(
    root: Path, arm: Arm, study: Study, bases: Tensor, splits: tuple[Problems, Problems]
) -> None:
    begin = time.perf_counter()
    names = [study.name_of(arm, run) for run in study.runs]
    where = [
        root / name / f"base{run.base}_seed{run.seed}"
        for name, run in zip(names, study.runs, strict=True)
    ]
    if all((directory / "run.json").is_file() for directory in where):
        return
    group = Lockstep(MODEL_CONFIG, bases, arm, study.runs, splits[0], study.steps)
    for done in range(study.steps + 1):
        if done in study.looks:
            group.look(done, splits[1])
        if done < study.steps:
            group.step(done)
    for each in zip(where, names, group.curves, strict=True):
        _write(*each)
    finals = [sum(c.correct[study.steps]) / len(c.correct[study.steps]) for c in group.curves]
    seconds = time.perf_counter() - begin
    mean = 100 * sum(finals) / len(finals)
    print(f"{arm.name}: {len(finals)} runs, mean {mean:.1f} %, {seconds:.0f} s", flush=True)


def main() -> None:
    """One study on one task, in this process, on one core."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output-dir", default="runs/study", type=Path)
    parser.add_argument("--arms", help="names, with commas between them; otherwise all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, study = TASKS[arguments.task], STUDIES[arguments.study]
    chosen = arguments.arms.split(",") if arguments.arms else [arm.name for arm in study.arms]
    if unknown := set(chosen) - {arm.name for arm in study.arms}:
        parser.error(f"--arms {','.join(sorted(unknown))}: not in this study")
    splits = Problems(task, "train", _TRAINING), Problems(task, "heldout", _HELDOUT)
    bases = _bases(arguments.output_dir / f"{task.name}.pt", *splits)
    for arm in study.arms:
        if arm.name in chosen:
            root = arguments.output_dir / task.name / arguments.study
            _run_arm(root, arm, study, bases, splits)


if __name__ == "__main__":
    main()
