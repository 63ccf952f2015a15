"""Rollouts: tokens per second against transformers' ``generate`` with its KV cache.

    python -m benchmarks.rollouts '{"dtype": "bf16", "batch": 8, "rounds": 3}'

Prompts of 64 tokens, 128 new ones, 8 layers x 512, vocabulary 32k, the published sampling
(temperature 1.1, top-p 0.95, top-k 20) on both sides, nobody stops early.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.harness import Spread, interleaved, one_process, ratio, report, scratch
from benchmarks.models import job_config, load_peer, make_qwen3
from megatron_phf.model.architecture import read_architecture
from megatron_phf.rollout.megatron.engine import MegatronRollouts
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from megatron_phf.train.build import load_student

PROMPT, NEW, VOCABULARY = 64, 128, 32000
SAMPLING = {"temperature": 1.1, "top_p": 0.95, "top_k": 20}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    """Both programs on the same prompts, in turns."""
    torch.manual_seed(3)
    with scratch() as directory, one_process():
        path = make_qwen3(directory / "model")
        config = job_config(path, "--dtype", dtype)
        parallel.initialize(config.parallel)
        student = load_student(read_architecture(path), config, path)
        engine = MegatronRollouts(student, VOCABULARY, batch)
        peer = load_peer(path, DTYPES[dtype])
        prompts = torch.randint(VOCABULARY, (batch, PROMPT))
        mask = torch.ones_like(prompts)
        sampling = SamplingParams(**SAMPLING, max_new_tokens=NEW, stop_ids=(), seed=1)

        def ours() -> None:
            rows = engine.generate(prompts.tolist(), sampling, range(batch))
            assert all(len(row.token_ids) == NEW for row in rows)

        def theirs() -> None:
            with torch.no_grad():
                peer.generate(
                    prompts, attention_mask=mask, max_new_tokens=NEW, do_sample=True, **SAMPLING
                )

        times = interleaved({"ours": ours, "transformers": theirs}, rounds)
    speed = {k: Spread.of([batch * NEW / s for s in v]) for k, v in times.items()}
    return {
        "speedup": ratio(times["transformers"], times["ours"]).as_json(),
        "tokens_per_second": {k: v.as_json() for k, v in speed.items()},
    }


if __name__ == "__main__":
    report(measure(**json.loads(sys.argv[1])))
