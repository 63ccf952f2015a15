"""The batched engine's steps beside the training job's: the same rollouts, the losses of both.

python -m benchmarks.study.replay '{"task": "two", "arm": "phf_0.5", "steps": 100}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import one_process, report, scratch
from benchmarks.models import job_config
from benchmarks.study.model import from_hf
from benchmarks.study.studies import STUDIES
from benchmarks.study.task import TASKS, Problems
from benchmarks.study.train import BATCH, CLIP_GRAD, TEMPERATURE, Arm, Lockstep, Run
from megatron_phf.demo.task import MODEL_CONFIG, make_hf_directory
from megatron_phf.rollout.sources import ReplaySource
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import read_models
from megatron_phf.train.build import load_student, make_distiller
from megatron_phf.train.metrics import PhaseTimer


class _Recorded(Lockstep):
    """Writes what it trains on as lines of a replay file."""

    lines: list[str]

    def train_on(self, done: int, index: Tensor, responses: Tensor, lengths: Tensor) -> None:
        for at, response, n in zip(index[0], responses[0], lengths[0], strict=True):
            line = {
                "student_prompt_ids": self._prompts[0][at].tolist(),
                "teacher_prompt_ids": self._prompts[1][at].tolist(),
                "response_ids": response[:n].tolist(),
            }
            self.lines.append(json.dumps(line))
        super().train_on(done, index, responses, lengths)


def _job(directory: Path, arm: Arm, run: Run, steps: int) -> list[dict[str, float]]:
    """The training job's metrics of each step on ``replay``."""
    config = job_config(
        str(directory), "--rollout-engine", "replay", "--replay-file", str(directory / "replay"),
        "--train-iters", str(steps), "--global-batch-size", str(BATCH), "--dtype", "fp32",
        "--micro-batch-size", str(BATCH), "--make-vocab-size-divisible-by", "8",
        "--lr", str(run.lr), "--lr-warmup-iters", str(run.warmup), "--clip-grad", str(CLIP_GRAD),
        "--phf-alpha", str(arm.alpha), "--phf-terms", ",".join(arm.terms),
        "--opsd-weight", str(arm.opsd_weight), "--opsd-beta", str(arm.beta),
        "--opsd-clip-mode", "none", "--opsd-temperature", str(TEMPERATURE),
        "--max-new-tokens", "64", "--max-prompt-length", "64",
    )  # fmt: skip
    with one_process():
        parallel.initialize(config.parallel)
        models = read_models(config)
        student = load_student(models.student, config, str(directory))
        distiller = make_distiller(models, config, student)
        source = ReplaySource(str(directory / "replay"), models.student.vocab_size, config)
        metrics = [distiller.step(i, source.rollouts(i), PhaseTimer()) for i in range(1, steps + 1)]
    return [{"opsd": m.opsd, "grad_norm": m.grad_norm} for m in metrics]


def compare(task: str, arm: str, steps: int, lr: float = 5e-4, warmup: int = 20) -> dict[str, Any]:
    """The largest relative difference of each metric over ``steps``, and the last output losses.

    ``task`` and ``arm`` by name; the base model is a random one.
    """
    chosen = {a.name: a for study in STUDIES.values() for a in study.arms}[arm]
    run = Run(0, 1, lr, warmup)
    with scratch() as directory:
        make_hf_directory(str(directory), seed=1)
        file = directory / "model.safetensors"
        torch.manual_seed(0)  # larger weights, so that its responses differ
        tensors = {n: x + 0.05 * torch.randn_like(x) for n, x in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        train = Problems(TASKS[task], "train", 1000)
        bases = from_hf(MODEL_CONFIG, tensors)[None]
        ours = _Recorded(MODEL_CONFIG, bases, chosen, [run], train, steps)
        ours.lines = []
        for done in range(steps):
            ours.step(done)
        (directory / "replay").write_text("\n".join(ours.lines) + "\n")
        theirs = _job(directory, chosen, run, steps)
    both = list(zip(ours.curves[0].metrics, theirs, strict=True))
    return {
        **{
            f"{name}_difference": max(abs(a[name] / b[name] - 1) for a, b in both)
            for name in ("opsd", "grad_norm")
        },
        "opsd": [both[-1][0]["opsd"], both[-1][1]["opsd"]],
        "steps": steps,
    }


if __name__ == "__main__":
    report(compare(**json.loads(sys.argv[1])))
