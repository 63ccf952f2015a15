"""A whole training step against the official OPSD trainer's (``benchmarks.official``).

    python -m benchmarks.peer '{"what": "time", "variants": ["ours", "official"], ...}'
    python -m benchmarks.peer '{"what": "memory", "variant": "ours", "lora_rank": 64}'
    python -m benchmarks.peer '{"what": "profile", "variant": "ours", "lora_rank": 64}'

Both sides: one model of 8 layers x 512 with Qwen3's vocabulary (most of its work is the output
head, as in no model of a useful size), 4 rollouts a step in microbatches of 2, prompts of 32 and 96
tokens, 64 new ones from each side's own rollouts, nobody stops early, the same divergence, clamp,
adapters, gradient clip and AdamW, fp32.  Before anything is timed both train on the same responses
and must report the same losses, which a step that computed something else would not.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Spread,
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
from benchmarks.official import SAMPLING, Batch, OfficialTrainer, Settings
from megatron_phf.data.rollouts import Rollout
from megatron_phf.model.architecture import read_architecture
from megatron_phf.rollout.megatron.engine import student_engine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import Models
from megatron_phf.train.build import load_student, make_distiller
from megatron_phf.train.metrics import PhaseTimer

VOCABULARY, PROMPT, TEACHER_PROMPT, NEW, BATCH = 151936, 32, 96, 64, 4
# Sharp enough that the clamp has something to clamp.
INITIALIZER_RANGE = 0.1
CHECKED_STEPS, TOLERANCE = 3, 1e-3
Step = Callable[[Tensor | int, PhaseTimer], float]


class OurTrainer:
    """The product's step: its rollouts and its ``Distiller``, with the stand-in's settings."""

    def __init__(self, directory: str, settings: Settings, alpha: float, adapter: str | None):
        flags = {
            "dtype": "fp32",
            "phf-alpha": alpha,
            "opsd-beta": settings.beta,
            "opsd-temperature": settings.temperature,
            "opsd-clip": settings.clip,
            "lr": settings.lr,
            "lr-decay-style": "constant",
            "clip-grad": settings.max_grad_norm,
            "micro-batch-size": settings.micro_batch,
            "lora-rank": settings.lora_rank,
            "lora-alpha": settings.lora_alpha,
            # What the official trainer reads without adapters: the current weights.
            "teacher": "frozen" if settings.lora_rank else "live",
        }
        if adapter is not None:
            flags["lora-adapter"] = adapter
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        config = job_config(directory, "--global-batch-size", str(BATCH), *words)
        arch = read_architecture(directory)
        student = load_student(arch, config, directory)
        self.distiller = make_distiller(Models(arch), config, student)
        self._engine, self._iteration = student_engine(config, Models(arch), student), 0

    def step(self, batch: Batch, responses: Tensor | int, timer: PhaseTimer) -> float:
        """As ``OfficialTrainer.step``."""
        self._iteration += 1
        prompts = batch.student.tolist()
        if isinstance(responses, int):
            sampling = SamplingParams(
                **SAMPLING, max_new_tokens=responses, stop_ids=(), seed=self._iteration
            )
            with timer.phase("rollout"):
                sampled = self._engine.generate(prompts, sampling, range(len(prompts)))
            rows = [r.token_ids for r in sampled]
            assert all(len(row) == responses for row in rows)
        else:
            rows = responses.tolist()
        rollouts = [
            Rollout(tuple(p), tuple(q), tuple(r))
            for p, q, r in zip(prompts, batch.teacher.tolist(), rows, strict=True)
        ]
        return self.distiller.step(self._iteration, rollouts, timer).opsd


def make_batch(seed: int, vocabulary: int = VOCABULARY) -> Batch:
    """Random prompts of one step."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (PROMPT, TEACHER_PROMPT)
    return Batch(*(torch.randint(vocabulary, (BATCH, n), generator=generator) for n in sizes))


def make_model(directory: Path, **settings: Any) -> str:
    """The benchmark's model; its path."""
    values = {"vocab_size": VOCABULARY, "initializer_range": INITIALIZER_RANGE, **settings}
    return make_qwen3(directory / "model", **values)


def make_adapter(directory: Path, model: str, lora_rank: int) -> str | None:
    """New adapters for all of them, as a PEFT directory; None without any."""
    if not lora_rank:
        return None
    OfficialTrainer(model, Settings(lora_rank), torch.float32).model.save_pretrained(
        directory / "adapter"
    )
    gc.collect()  # transformers' modules refer to each other
    return str(directory / "adapter")


def make_trainers(
    model: str, adapter: str | None, lora_rank: int, names: list[str]
) -> dict[str, Any]:
    """Those of ``names``, from the same weights and the same adapters.

    ``official`` is as its scripts have it, ``official_plain`` without gradient checkpointing,
    ``official_whole`` without that and with all rollouts in one microbatch.
    """
    settings = Settings(lora_rank)
    plain = dataclasses.replace(settings, checkpointing=False)
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: OurTrainer(model, settings, 0.0, adapter),
        "ours_phf": lambda: OurTrainer(model, settings, 0.05, adapter),
        "official": lambda: _official(model, settings, adapter),
        "official_plain": lambda: _official(model, plain, adapter),
        "official_whole": lambda: _official(
            model, dataclasses.replace(plain, micro_batch=BATCH), adapter
        ),
    }
    return {name: makers[name]() for name in names}


def _official(model: str, settings: Settings, adapter: str | None) -> OfficialTrainer:
    trainer = OfficialTrainer(model, settings, torch.float32)
    if adapter is not None:
        trainer.model.load_adapter(adapter, "default", is_trainable=True)
    return trainer


def loss_difference(ours: Any, theirs: Any, batch: Batch, responses: Tensor) -> float:
    """The largest relative difference of the losses of a few steps on the same responses.

    Losses after the first step also hold the backward pass and the optimizer against each other.

    Raises:
        AssertionError: above ``TOLERANCE``, or the steps did not change the loss.
    """
    losses = [
        [trainer.step(batch, responses, PhaseTimer()) for _ in range(CHECKED_STEPS)]
        for trainer in (ours, theirs)
    ]
    differences = [abs(a - b) / b for a, b in zip(*losses, strict=True)]
    assert max(differences) < TOLERANCE, f"ours {losses[0]}, theirs {losses[1]}"
    assert abs(losses[1][-1] / losses[1][0] - 1) > 10 * TOLERANCE, f"nothing learnt: {losses[1]}"
    return max(differences)


def _medians(timers: list[PhaseTimer]) -> dict[str, float]:
    """Seconds of each phase."""
    names = timers[0].seconds
    return {name: statistics.median(t.seconds[name] for t in timers) for name in names}


def time(lora_rank: int, rounds: int, variants: list[str]) -> dict[str, Any]:
    """Seconds of a step of each of ``variants``, the last one official, and of its phases."""
    with scratch() as directory, one_process():
        model = make_model(directory)
        parallel.initialize(job_config(model).parallel)
        adapter = make_adapter(directory, model, lora_rank)
        trainers = make_trainers(model, adapter, lora_rank, variants)
        batch = make_batch(1)
        responses = make_batch(2).student[:, :32]
        difference = loss_difference(
            trainers[variants[0]], trainers[variants[-1]], batch, responses
        )
        timers: dict[str, list[PhaseTimer]] = {name: [] for name in variants}

        def step(name: str) -> None:
            timers[name].append(PhaseTimer())
            trainers[name].step(batch, NEW, timers[name][-1])

        times = interleaved({name: lambda n=name: step(n) for name in variants}, rounds)
    pairs = itertools.product(
        *([n for n in variants if n.startswith(side)] for side in ("official", "ours"))
    )
    return {
        "loss_difference": difference,
        "time_ratio": {f"{a}_over_{b}": ratio(times[a], times[b]).as_json() for a, b in pairs},
        "seconds": {name: Spread.of(values).as_json() for name, values in times.items()},
        "phase_seconds": {name: _medians(timers[name][1:]) for name in variants},
    }


class _Peaks:
    """Peak resident memory of each phase, beyond what was resident at first."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self._before, self._phase = resident_bytes(), "load"
        reset_peak()

    def enter(self, phase: str) -> None:
        """The last phase is over."""
        peak = (peak_bytes() - self._before) / 2**20
        self.mib[self._phase] = max(self.mib.get(self._phase, 0.0), peak)
        self._phase = phase
        reset_peak()


def memory(variant: str, lora_rank: int, new: int = NEW) -> dict[str, Any]:
    """Peak of two steps (the second has the optimizer's state) in this fresh process."""
    with scratch() as directory, one_process():
        model = make_model(directory)
        weights = sum(f.stat().st_size for f in Path(model).glob("*.safetensors")) / 2**20
        parallel.initialize(job_config(model).parallel)
        adapter = make_adapter(directory, model, lora_rank)
        peaks = _Peaks()
        trainer = make_trainers(model, adapter, lora_rank, [variant])[variant]
        for _ in range(2):
            trainer.step(make_batch(1), new, PhaseTimer(peaks.enter))
        peaks.enter("")
    steps = max(peak for phase, peak in peaks.mib.items() if phase != "load")
    return {
        "peak_mib": max(peaks.mib.values()),
        "steps_peak_mib": steps,
        "steps_beyond_weights_mib": steps - weights,
        "phases_mib": peaks.mib,
    }


def profile(variant: str, lora_rank: int, rows: int = 12) -> dict[str, float]:
    """The operators that take most of a step: each one's share of the time within operators."""
    with scratch() as directory, one_process():
        model = make_model(directory)
        parallel.initialize(job_config(model).parallel)
        adapter = make_adapter(directory, model, lora_rank)
        trainer = make_trainers(model, adapter, lora_rank, [variant])[variant]
        trainer.step(make_batch(1), NEW, PhaseTimer())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            trainer.step(make_batch(1), NEW, PhaseTimer())
    events = found.key_averages()
    whole = sum(e.self_cpu_time_total for e in events)
    first = sorted(events, key=lambda e: -e.self_cpu_time_total)[:rows]
    return {e.key: e.self_cpu_time_total / whole for e in first}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    function = {"time": time, "memory": memory, "profile": profile}[arguments.pop("what")]
    report(function(**arguments))
