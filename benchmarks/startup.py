"""Start-up: seconds until ``--help`` has answered, and until a job has finished its first step.

    python -m benchmarks.startup '{"what": "answer", "rounds": 5}'
    python -m benchmarks.startup '{"what": "first_step", "rounds": 3}'

The job is the embedded task's model and problems as files, in one process: what it takes is what
any job pays, however small its weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import REPO, Spread, report, scratch, seconds_of
from megatron_phf.runtime.environment import torchrun

_LAUNCH = ("bash", "examples/pretrain_phf.sh")
_BATCH = 32
# What each process imports, in its order.
_IMPORTS = """
import megatron_phf.cli.main
from megatron_phf.runtime import device
device.import_megatron()
import megatron_phf.train.loop
"""


def _call(*command: str) -> None:
    subprocess.run(command, cwd=REPO, capture_output=True, check=True)


def answer(rounds: int) -> dict[str, Any]:
    """The launch script's ``--help``, as users start it."""
    _call(*_LAUNCH, "--help")
    times = [seconds_of(lambda: _call(*_LAUNCH, "--help")) for _ in range(rounds)]
    code = "import sys, megatron_phf.config.flags; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    return {
        "help_seconds": Spread.of(times).as_json(),
        "imports_torch": done.stdout.strip() == "True",
    }


def _write_job(directory: Path) -> list[str]:
    """The embedded task as files; the flags of a job on them."""
    from megatron_phf.data.problems import write_jsonl
    from megatron_phf.demo.task import ARITHMETIC_TEMPLATES, make_hf_directory, make_problems

    make_hf_directory(str(directory / "model"), seed=1)
    fields = ("problem", "solution", "answer")
    lines = [{k: getattr(p, k) for k in fields} for p in make_problems("train", 1000, 1)]
    write_jsonl(str(directory / "problems.jsonl"), lines)
    flags = ["--hf-model", str(directory / "model"), "--data", str(directory / "problems.jsonl")]
    for side in ("student", "teacher"):
        path = directory / f"{side}.txt"
        path.write_text(getattr(ARITHMETIC_TEMPLATES, side), encoding="utf-8")
        flags += [f"--{side}-template", str(path)]
    flags += ["--train-iters", "1", "--global-batch-size", str(_BATCH), "--micro-batch-size", "16"]
    flags += ["--max-new-tokens", "40", "--max-prompt-length", "64"]
    flags += ["--max-teacher-prompt-length", "96", "--no-progress"]
    return [*flags, "--output-dir", str(directory / "out")]


def _job(flags: list[str]) -> dict[str, float]:
    """Seconds from the launch until the start-up summary, and until the step's line."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    seen: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(
        [*_LAUNCH, *flags],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for mark, begins in (("summary", "model "), ("step", "step 1/1")):
                if line.startswith(begins):
                    seen.setdefault(mark, time.perf_counter() - start)
    assert process.returncode == 0, f"the job failed with status {process.returncode}"
    return seen


def _parts(flags: list[str], metrics: Path) -> dict[str, float]:
    """Seconds of one launch and of its parts."""
    alone = {
        "preflight": ["-m", "megatron_phf.cli.preflight", *flags],
        "torchrun": [*torchrun(1)[1:], "--no-python", sys.executable, "-c", "pass"],
        "imports": ["-c", _IMPORTS],
    }
    parts = {k: seconds_of(lambda c=c: _call(sys.executable, *c)) for k, c in alone.items()}
    seen = _job(flags)
    line = json.loads(metrics.read_text().splitlines()[-1])
    step = sum(line["seconds"].values())
    parts["load"] = max(seen["step"] - seen["summary"] - step, 0.0)
    return {"total": seen["step"], **parts, "step": step}


def first_step(rounds: int) -> dict[str, Any]:
    """From launch to the line of step 1, and where it goes.

    Preflight, torchrun and imports are timed alone and add up to more than they take in a row;
    ``load`` is what comes between the start-up summary and the step: prompts, weights, teacher,
    optimizer.
    """
    with scratch() as directory:
        flags, metrics = _write_job(directory), directory / "out" / "metrics.jsonl"
        _parts(flags, metrics)  # from the disk
        every = [_parts(flags, metrics) for _ in range(rounds)]
    return {
        "first_step_seconds": {
            name: Spread.of([parts[name] for parts in every]).as_json() for name in every[0]
        }
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    function = {"answer": answer, "first_step": first_step}[arguments.pop("what")]
    report(function(**arguments))
