"""Steps whose rollouts are sampled while others train: seconds a step for K steps ahead.

    python -m benchmarks.overlap '{"ratio": 3, "steps": 30}'

A server in a process of its own takes ``ratio`` times as long for a step's rollouts as the step
trains; it has fewer slots than requests, and requests of different lengths.  Its answers are
scripted, and training waits until its time is over: what is measured is the schedule, on a machine
whose cores are busy with others.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import REPO, one_process, report, scratch
from benchmarks.startup import _write_job
from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.runtime import parallel
from megatron_phf.runtime.heartbeat import Heartbeat
from megatron_phf.runtime.signals import StopSignals
from megatron_phf.train import loop
from megatron_phf.train.hooks import RunHook
from megatron_phf.train.metrics import StepMetrics
from megatron_phf.train.step import Distiller

BATCH, SLOTS, TRAINING_SECONDS = 16, 8, 0.4
WARM = 2  # steps that fill the pipeline


class _Times(RunHook):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_step(self, iteration: int, metrics: StepMetrics) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def _pad_training() -> None:
    """Let a step train for ``TRAINING_SECONDS``, as a GPU would, without this machine's cores."""
    train = Distiller.step

    def step(self: Distiller, *given: Any) -> StepMetrics:
        end = time.perf_counter() + TRAINING_SECONDS
        metrics = train(self, *given)
        time.sleep(max(end - time.perf_counter(), 0.0))
        return metrics

    Distiller.step = step  # type: ignore[method-assign]


def _run(config: Config) -> dict[str, float]:
    times = _Times()
    history = loop.train(config, StopSignals(), Heartbeat(), more=[times], brief=True)
    steps = [b - a for a, b in zip(times.ends[WARM:], times.ends[WARM + 1 :], strict=False)]
    rows = [metrics.extra for metrics in history[WARM + 1 :]]
    waits = [row["seconds"].get("rollout_wait", row["seconds"]["rollout"]) for row in rows]
    return {
        "step_seconds": statistics.mean(steps),
        "wait_seconds": statistics.mean(waits),
        "overlap": statistics.mean(row.get("rollout_overlap", 0.0) for row in rows),
    }


def _config(directory: Path, flags: list[str], url: str, steps: int, ahead: int) -> Config:
    config = parse_args(
        [
            *flags, "--rollout-engine", "vllm", "--vllm-url", url, "--lora-rank", "4",
            "--train-iters", str(steps + WARM + 1), "--global-batch-size", str(BATCH),
            "--output-dir", str(directory / f"ahead{ahead}"), "--no-tensorboard",
            "--max-off-policy-steps", str(ahead), "--engine-drift-warning", "100",
        ]
    )  # fmt: skip
    preflight.check(config)
    return config


def run(ratio: float, steps: int, ahead: list[int] | None = None) -> dict[str, Any]:
    """Of each K: seconds a step, of them waited for rollouts, share of the step that overlaps.

    Limits: with K = 1 the longer of training and a step's rollouts alone, the weights' way and the
    slots that idle at their end included (what K = 0 waits for); with more, of training and what
    the slots take without idling.
    """
    # All slots full but for the end: a request's mean is its share of the slots' time.
    mean = ratio * TRAINING_SECONDS * SLOTS / BATCH
    low, high = 0.5 * mean, 1.5 * mean
    command = [sys.executable, "-m", "tests.fake_vllm", "--delay", str(low), str(high)]
    _pad_training()
    found: dict[str, Any] = {}
    with scratch() as directory, one_process():
        flags = _write_job(directory)
        with subprocess.Popen(
            [*command, "--slots", str(SLOTS)],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for k in ahead or [0, 1, 2]:
                config = _config(directory, flags, url, steps, k)
                if not found:
                    parallel.initialize(config.parallel)
                    parallel.seed(config.train.seed)
                found[f"ahead_{k}"] = _run(config)
    alone = found["ahead_0"]["wait_seconds"] if "ahead_0" in found else 0.0
    busy = ratio * TRAINING_SECONDS
    limits = {"ahead_1": max(TRAINING_SECONDS, alone), "more": max(TRAINING_SECONDS, busy)}
    seconds = {"training": TRAINING_SECONDS, "rollouts": alone, "slots_without_idling": busy}
    return {**found, "seconds_of_one": seconds, "limit_seconds": limits}


if __name__ == "__main__":
    report(run(**json.loads(sys.argv[1])))
