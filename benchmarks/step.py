"""A training step: what PHF adds to OPSD's, and the memory formula against a measured peak.

    python -m benchmarks.step '{"what": "phf_price", "rounds": 5}'
    python -m benchmarks.step '{"what": "memory", "layers": 8, "response": 448, "batch": 4,
        "hidden": 512, "flags": ["--recompute-granularity", "full"]}'

Replayed rollouts, fp32, one process; student and frozen teacher with weights of their own.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    Spread,
    from_rank_0,
    interleaved,
    one_process,
    peak_bytes,
    ratio,
    report,
    reset_peak,
    resident_bytes,
    scratch,
)
from benchmarks.models import job_config, make_qwen3
from megatron_phf.estimate.memory import Machine, peak_estimate
from megatron_phf.model.architecture import read_architecture
from megatron_phf.rollout.sources import ReplaySource
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import Models
from megatron_phf.train.build import load_student, make_distiller
from megatron_phf.train.metrics import PhaseTimer

PROMPT, TEACHER_PROMPT = 64, 192


def write_replay(path: Path, batch: int, response: int, vocabulary: int) -> str:
    """Random rollouts, one global batch; the path."""
    generator = random.Random(3)
    sizes = {
        "student_prompt_ids": PROMPT,
        "teacher_prompt_ids": TEACHER_PROMPT,
        "response_ids": response,
    }
    with open(path, "w") as f:
        for _ in range(batch):
            line = {k: generator.choices(range(vocabulary), k=n) for k, n in sizes.items()}
            f.write(json.dumps(line) + "\n")
    return str(path)


def distiller_of(model: str, replay: str, batch: int, *flags: str) -> tuple[Any, Any]:
    """(distiller, the replayed rollouts of its step)."""
    config = job_config(
        model, "--rollout-engine", "replay", "--replay-file", replay, "--train-iters", "1",
        "--global-batch-size", str(batch), "--dtype", "fp32", *flags,
    )  # fmt: skip
    arch = read_architecture(model)
    distiller = make_distiller(Models(arch), config, load_student(arch, config, model))
    return distiller, ReplaySource(replay, arch.vocab_size, config).rollouts(1)


def phf_price(rounds: int, response: int = 192, batch: int = 4) -> dict[str, Any]:
    """Seconds of a step with PHF over those of the same step with OPSD alone; bytes of targets."""
    with scratch() as directory, one_process():
        model = make_qwen3(directory / "model", num_hidden_layers=6)
        replay = write_replay(directory / "replay", batch, response, 32000)
        parallel.initialize(job_config(model).parallel)
        steps = {}
        for name, alpha in (("phf", "0.05"), ("opsd", "0")):
            distiller, rollouts = distiller_of(model, replay, batch, "--phf-alpha", alpha)
            steps[name] = lambda d=distiller, r=rollouts: d.step(1, r, PhaseTimer())
        times = interleaved(steps, rounds)
    return {
        "time_ratio": ratio(times["phf"], times["opsd"]).as_json(),
        "seconds": {name: Spread.of(v).as_json() for name, v in times.items()},
    }


def memory(layers: int, response: int, batch: int, hidden: int, flags: list[str]) -> dict[str, Any]:
    """Measured peak of a step over the formula's, in this fresh process (rank 0 of several)."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden}
    with scratch() as directory, one_process():
        model = from_rank_0(lambda: make_qwen3(directory / "model", **shape))
        replay = from_rank_0(lambda: write_replay(directory / "r", batch, response, 32000))
        flags = [*flags, "--micro-batch-size", str(batch), "--logits-chunk-tokens", "64"]
        flags += ["--max-new-tokens", str(response)]
        config = job_config(model, *flags, "--global-batch-size", str(batch))
        parallel.initialize(config.parallel)
        reset_peak()
        before = resident_bytes()
        distiller, rollouts = distiller_of(model, replay, batch, *flags)
        for i in (1, 2):  # the second step has the optimizer's state
            distiller.step(i, rollouts, PhaseTimer())
        measured = peak_bytes() - before
        machine = Machine(4, parallel.data_parallel_size(), cuda=False)
        arch = read_architecture(model)
        parts = peak_estimate(Models(arch), config, machine, batch * (PROMPT + response))
    return {
        "predicted_over_measured": sum(parts.values()) * 2**30 / measured,
        "measured_mib": measured / 2**20,
        "parts_mib": {name: gib * 1024 for name, gib in parts.items()},
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    function = {"phf_price": phf_price, "memory": memory}[arguments.pop("what")]
    report(function(**arguments))
