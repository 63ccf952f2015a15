"""One job that is stopped in every way SLURM has, against one that is left alone: bit-equal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_phf.demo.task import make_hf_directory, make_problems
from tests.launch import unmeasured
from tests.slurm.cluster import Cluster

PRETRAIN = "examples/slurm/pretrain_phf.sbatch"
ITERS, INTERVAL = 28, 2


class Run:
    """A training job on two nodes: TP 2 within a node, DP 2 across, an EMA teacher, rollouts."""

    def __init__(self, cluster: Cluster, inputs: Path, out: Path) -> None:
        self.cluster, self.out = cluster, out
        self.job = cluster.submit(
            out / "job.out", "--nodes=2", "--gpus-per-node=2", "--time=60", PRETRAIN,
            *named(inputs), "--tensor-model-parallel-size", "2", "--teacher", "ema",
            "--global-batch-size", "8", "--micro-batch-size", "2", "--max-new-tokens", "24",
            "--lr", "1e-3", "--dtype", "fp32",
            "--no-tensorboard", "--save-hf", str(out / "hf"),
            OUTPUT_DIR=str(out), TRAIN_ITERS=str(ITERS), SAVE_INTERVAL=str(INTERVAL),
        )  # fmt: skip

    def saved(self) -> int:
        """The newest checkpoint's iteration."""
        path = self.out / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(path.read_text()) if path.exists() else 0

    def metrics(self) -> list[dict]:
        """Every step's, without what is measured."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [unmeasured(json.loads(line)) for line in lines]

    def wait_for_checkpoint(self) -> None:
        """Until a checkpoint newer than the newest is there."""
        newest = self.saved()
        self.job.wait_for(lambda: self.saved() > newest, f"a checkpoint beyond {newest}")

    def time_limit(self, minutes: int) -> None:
        """Change the job's time limit."""
        self.cluster.client("scontrol", "update", f"JobId={self.job.id}", f"TimeLimit={minutes}")

    def wait_for_life(self, number: int) -> None:
        """Until the job runs for the ``number``-th time."""
        shown = f"life {number}: starts at iteration"
        self.job.wait_for(lambda: shown in self.job.text(), shown)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    make_inputs(path)
    return path


def make_inputs(path: Path) -> None:
    """A model, problems and templates."""
    make_hf_directory(str(path / "hf"), seed=3)
    lines = [{"problem": p.problem, "solution": p.solution} for p in make_problems("train", 40, 1)]
    (path / "problems.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for side, text in (("student", "{problem}="), ("teacher", "{problem}|{solution}=")):
        (path / f"{side}.txt").write_text(text)


def named(inputs: Path) -> list[str]:
    """The flags that name these files, and what fits their model."""
    flags = ["--hf-model", str(inputs / "hf"), "--data", str(inputs / "problems.jsonl")]
    for side in ("student", "teacher"):
        flags += [f"--{side}-template", str(inputs / f"{side}.txt")]
    return [*flags, "--max-prompt-length", "64", "--max-teacher-prompt-length", "160"]


def pause_ranks(run: Run) -> None:
    """SIGSTOP to every rank of the job, past SLURM."""
    sent = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = str(run.out).encode() in (process / "cmdline").read_bytes()
            if ours and b"\0LOCAL_RANK=" in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGSTOP)
                sent += 1
    assert sent == 4


def minutes(clock: str) -> int:
    """SLURM's [days-]hours:minutes:seconds, seconds cut off."""
    hours, minute, _ = clock.split(":")
    return 60 * int(hours) + int(minute)


def signalled_before_the_time_limit(run: Run) -> None:
    """--signal=USR1@120: the limit comes near; the ranks save, the script requeues the job.

    SLURM looks at its clocks every 30 s; so that the ranks do not finish before, they are paused.
    It sends SIGCONT before the signal.
    """
    run.wait_for_checkpoint()
    pause_ranks(run)
    run.time_limit(minutes(run.job.fields()["RunTime"]) + 2)
    run.job.wait_for(lambda: "requeueing" in run.job.text(), "the script's requeue")
    run.time_limit(60)
    assert "SIGUSR1 received: ending after step" in run.job.text()
    assert "left with status 0 at iteration" in run.job.text()


def requeued(run: Run) -> None:
    """scontrol requeue, as preemption does it."""
    run.wait_for_checkpoint()
    run.cluster.client("scontrol", "requeue", run.job.id)


def lost_a_node(run: Run) -> None:
    """SIGKILL for all that runs on the second node; it is declared down, and comes back."""
    run.wait_for_checkpoint()
    run.cluster.tool("kill", "n2")
    run.cluster.client("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=killed")
    run.cluster.tool("boot", "n2")
    # Refused where the node has registered, and so returned to service, already.
    with contextlib.suppress(AssertionError):
        run.cluster.client("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_four_lives_equal_one(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """USR1 before the time limit, a requeue, a killed node: weights and metrics bit-equal."""
    alone, disturbed = tmp_path / "alone", tmp_path / "disturbed"
    alone.mkdir()
    disturbed.mkdir()
    reference = Run(cluster, inputs, alone)
    reference.job.wait_until("COMPLETED")
    run = Run(cluster, inputs, disturbed)
    for life, disturb in enumerate((signalled_before_the_time_limit, requeued, lost_a_node), 1):
        run.wait_for_life(life)
        disturb(run)
        run.wait_for_life(life + 1)
        assert 0 < run.saved() < ITERS
        print(f"\n{disturb.__name__}: continues from iteration {run.saved()}")
    run.job.wait_until("COMPLETED")
    print(run.job.text())
    assert int(run.job.fields()["Restarts"]) == 3
    assert [m["step"] for m in run.metrics()] == list(range(1, ITERS + 1))
    assert run.metrics() == reference.metrics()
    expected, found = (load_file(d / "hf" / "model.safetensors") for d in (alone, disturbed))
    assert expected.keys() == found.keys()
    assert all((expected[k] == found[k]).all() for k in expected)
    start = load_file(inputs / "hf" / "model.safetensors")
    assert not all((expected[k] == start[k]).all() for k in expected)  # something was learned


def test_a_run_that_saves_nothing_new_gives_up(cluster: Cluster, tmp_path: Path) -> None:
    """No endless loop of lives: prompts that are all too long fail the job in its first one."""
    make_hf_directory(str(tmp_path / "hf"), seed=3)
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "1+1", "solution": "2"}\n')
    job = cluster.submit(
        tmp_path / "job.out", "--gpus-per-node=1", PRETRAIN, "--hf-model", str(tmp_path / "hf"),
        "--data", str(data), "--max-prompt-length", "64", "--max-teacher-prompt-length", "160",
        OUTPUT_DIR=str(tmp_path), MAX_RESTARTS="0",
    )  # fmt: skip
    job.wait_until("FAILED")
    assert "error: all 1 problems are too long" in job.text()
    assert "saved nothing new at iteration 0 of 100: giving up" in job.text()
    assert job.fields()["Restarts"] == "0"


def test_job_array(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """Two ablations side by side, a node each: each line's flags, each in its directory."""
    lines = "# name flags\n\nopsd --phf-alpha 0\nphf --phf-alpha 0.5 --seed 9\n../out --lr 1\n"
    (tmp_path / "runs.txt").write_text(lines)
    job = cluster.submit(
        tmp_path / "%a.out", "--array=1-4", "--gpus-per-node=1",
        "examples/slurm/ablations.sbatch", str(tmp_path / "runs.txt"),
        *named(inputs), "--global-batch-size", "2", "--max-new-tokens", "8", "--no-tensorboard",
        OUTPUT_DIR=str(tmp_path), TRAIN_ITERS="2",
    )  # fmt: skip
    end = time.monotonic() + 150
    while cluster.client("squeue", "-h", "-j", job.id) and time.monotonic() < end:
        time.sleep(0.5)
    texts = {n: (tmp_path / f"{n}.out").read_text() for n in (1, 2, 3, 4)}
    for n, name in ((1, "opsd"), (2, "phf")):
        assert "finished" in texts[n], texts[n]
        steps = [
            json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert (steps[0]["flow"] is None) == (name == "opsd")
    assert "line 3: ../out is not a plain name" in texts[3]
    assert "has no line 4" in texts[4]
