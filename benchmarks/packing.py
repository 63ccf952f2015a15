"""A training step on rollouts of very different lengths: padded microbatches against packed rows.

    python -m benchmarks.packing '{"rounds": 5}'

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
    interleaved,
    one_process,
    ratio,
    report,
    scratch,
)
from benchmarks.models import job_config, make_qwen3
from benchmarks.step import distiller_of
from megatron_phf.runtime import parallel
from megatron_phf.train.metrics import PhaseTimer

BUDGET = 1024
VARIANTS = {
    "one_length": ["--micro-batch-size", "2"],
    "budget": ["--max-tokens-per-microbatch", str(BUDGET)],
    "packed": ["--max-tokens-per-microbatch", str(BUDGET), "--pack-sequences"],
}


def write_replay(path: Path, batch: int, vocabulary: int) -> str:
    """Random rollouts of one global batch, response lengths log-uniform in 16 to 768; the path."""
    generator = random.Random(3)
    with open(path, "w") as f:
        for _ in range(batch):
            sizes = {
                "student_prompt_ids": generator.randint(16, 96),
                "teacher_prompt_ids": generator.randint(64, 256),
                "response_ids": int(16 * 48 ** generator.random()),
            }
            line = {k: generator.choices(range(vocabulary), k=n) for k, n in sizes.items()}
            f.write(json.dumps(line) + "\n")
    return str(path)


def packing(rounds: int, batch: int = 24) -> dict[str, Any]:
    """Seconds of a packed step over those of padded ones; useful tokens of each."""
    with scratch() as directory, one_process():
        model = make_qwen3(
            directory / "model",
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
        )
        replay = write_replay(directory / "replay", batch, 8192)
        parallel.initialize(job_config(model).parallel)
        steps, useful = {}, {}
        for name, flags in VARIANTS.items():
            distiller, rollouts = distiller_of(model, replay, batch, *flags)
            useful[name] = distiller.step(1, rollouts, PhaseTimer()).extra["useful_tokens_fraction"]
            steps[name] = lambda d=distiller, r=rollouts: d.step(1, r, PhaseTimer())
        times = interleaved(steps, rounds)
    return {
        "packed_over_budget": ratio(times["packed"], times["budget"]).as_json(),
        "packed_over_one_length": ratio(times["packed"], times["one_length"]).as_json(),
        "seconds": {name: Spread.of(v).as_json() for name, v in times.items()},
        "useful_tokens_fraction": useful,
    }


if __name__ == "__main__":
    report(packing(**json.loads(sys.argv[1])))
