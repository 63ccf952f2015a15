"""A tiny run for the fault tests: its files, flags, and how it is started and compared."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_phf.demo.task import make_hf_directory, make_problems
from megatron_phf.runtime.environment import torchrun
from tests.launch import run, unmeasured


def make_files(directory: Path) -> None:
    """Model, problems and templates."""
    make_hf_directory(str(directory / "hf"), seed=3)
    problems = make_problems("train", 7, 1)
    with open(directory / "data.jsonl", "w") as f:
        f.writelines(
            json.dumps({"problem": p.problem, "solution": p.solution}) + "\n" for p in problems
        )
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        (directory / f"{side}.txt").write_text(text)


def flags(directory: Path, steps: int) -> list[str]:
    """An on-policy run with an EMA teacher."""
    d = directory
    return [
        "--hf-model", str(d / "hf"), "--data", str(d / "data.jsonl"),
        "--student-template", str(d / "student.txt"), "--teacher-template", str(d / "teacher.txt"),
        "--train-iters", str(steps), "--global-batch-size", "4", "--lr", "1e-3", "--seed", "9",
        "--max-prompt-length", "64", "--max-teacher-prompt-length", "128",
        "--max-new-tokens", "8", "--no-tensorboard", "--no-progress", "--teacher", "ema",
        "--ema-decay", "0.6",
    ]  # fmt: skip


def outputs(directory: Path, name: str) -> list[str]:
    """Flags for what a run called ``name`` writes."""
    d = directory / name
    return [
        "--output-dir", str(d / "out"), "--metrics-file", str(d / "metrics.jsonl"),
        "--save", str(d / "checkpoints"), "--load", str(d / "checkpoints"),
        "--save-hf", str(d / "hf"),
    ]  # fmt: skip


def launch(plan: Path, arguments: list[str], restarts: int = 0, timeout: float = 600):
    """Two processes under torchrun, with the faults of ``plan``."""
    head = [*torchrun(2), "--max-restarts", str(restarts), "--shutdown-timeout", "3"]
    return run([*head, "tests/faults/faulty.py", str(plan), *arguments], timeout=timeout)


def write_plan(path: Path, *faults: dict) -> Path:
    """The plan's file."""
    path.write_text(json.dumps(faults))
    return path


def steps_of(directory: Path) -> list[dict]:
    """The lines of the metrics file, without what differs between two equal runs."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [unmeasured(json.loads(line)) for line in lines]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two exports are bit-equal."""
    a, b = (load_file(d / "hf" / "model.safetensors") for d in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def latest(directory: Path) -> int:
    """What the tracker says."""
    return int((directory / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
