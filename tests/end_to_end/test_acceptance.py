"""examples/h100/acceptance.sh on the CPU: the checks that make sense there run, and can fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_phf import preflight
from megatron_phf.flags import parse_args
from tests.launch import run
from tools import acceptance

SCRIPT = "examples/h100/acceptance.sh"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_on_the_cpu() -> None:
    done = run(["bash", SCRIPT], timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines[0] == ["check", "measured", "required", "result"]
    result = {line[0]: (line[1], line[3]) for line in lines[2:]}
    passed = {name for name, (_, word) in result.items() if word == "pass"}
    assert passed == {
        "parity with transformers, fp32", "parity with transformers, bf16",
        "parity with transformers, packed", "loss over 4 steps, bf16 against fp32",
    }  # fmt: skip
    shown = {name for name, (_, word) in result.items() if word == "shown"}
    assert shown == {
        "peak memory of a rank", "rollouts", "MFU of the student's pass, of 989 TFLOP/s",
        "flow loss, over OPSD's passes",
    }  # fmt: skip
    assert float(result["rollouts"][0].split()[0]) > 0
    assert "nan" not in done.stdout


def test_dry_run_says_what_would_run() -> None:
    done = run(["bash", SCRIPT, "--dry-run", "--gpus", "8"], timeout=60)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["parity_fp32", "parity_bf16", "parity_packed", "train", "train_coarse",
                     "train_opsd"]  # fmt: skip
    assert "(8 process(es))" in done.stdout and "--overlap-grad-reduce" in done.stdout


def plan(directory: Path, cuda: bool) -> acceptance.Plan:
    """Of runs that were made up."""

    def steps(loss: float, student: float) -> list[dict]:
        seconds = {"rollout": 2.0, "teacher": 1.0, "student": student, "optimizer": 0.1}
        step = {"loss": loss, "seconds": seconds, "rollout_tokens": 1600}
        return [{**step, "peak_memory_bytes": 2**31}] * 4

    for name, loss, student in (("train", 1.0, 4.0), ("train_opsd", 0.9, 3.0)):
        (directory / f"{name}.json").write_text(json.dumps(steps(loss, student)))
    (directory / "train_coarse.json").write_text(json.dumps(steps(1.06, 2.0)))
    (directory / "train.log").write_text("memory   2.50 GiB a rank, activations aside\n")
    return acceptance.Plan(str(directory), "", "", cuda, 1, 4, [], [], [])


def test_packed_rows_are_cut_over_gpus(tmp_path: Path) -> None:
    """On two GPUs or more, with flags that the checks before launch take."""
    more = dataclasses.replace(plan(tmp_path, cuda=True), layout=acceptance._LAYOUTS[8])
    argv = {case["name"]: case["argv"] for case in more.cases()}["parity_context"]
    config = parse_args(argv)
    assert config.batching.pack_sequences and config.parallel.context_parallel_size == 2
    preflight.check_world_size(config, 8)
    preflight._check_batching(config)
    rows = acceptance.evaluate(more, {c["name"]: "trouble" for c in more.cases()})
    assert [r.good for r in rows if r.name == "parity, context"] == [False]


def test_verdicts(tmp_path: Path) -> None:
    """A loss 6 % off, a peak below the estimate and a flow loss of 25 %."""
    gpu = plan(tmp_path, cuda=True)
    assert acceptance.curve_row(gpu).good is False
    assert acceptance.memory_row(gpu).good is False
    overhead = acceptance.overhead_row(gpu)
    assert overhead.measured == "25.0 %" and overhead.good is True
    assert acceptance.overhead_row(plan(tmp_path, cuda=False)).good is None
    (tmp_path / "train.log").write_text("memory   1.50 GiB a rank, activations aside\n")
    assert acceptance.memory_row(gpu).good is True
    rows = acceptance.evaluate(gpu, {name: "trouble" for name in (
        "parity_fp32", "parity_bf16", "parity_packed", "parity_fp8", "train",
        "train_opsd")})  # fmt: skip
    assert [row.good for row in rows] == [False] * len(rows)
    assert "**FAIL**" in acceptance.table(rows)


@pytest.mark.parametrize("given", [["model"], ["--gpus", "3"]])
def test_mistakes(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        acceptance.main(given)
