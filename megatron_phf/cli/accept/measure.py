"""Measurements of the large model, by the product's own parts, in one process a GPU.

    torchrun --nproc-per-node N -m megatron_phf.cli.accept.measure CASES.json OUTPUT_DIR

Each case leaves NAME.json as soon as it is done.  Replayed random rollouts of one length: no
padding and no luck of the draw in a figure.
"""

from __future__ import annotations

import functools
import math
import os
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_phf.cli import cases
from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.estimate.memory import Machine, kv_cache_bytes, peak_estimate
from megatron_phf.estimate.utilisation import Utilisation
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.rollout.megatron.engine import MegatronRollouts, student_engine
from megatron_phf.rollout.megatron.graphs import wants_graphs
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, parallel
from megatron_phf.teacher.architecture import read_models
from megatron_phf.teacher.kinds import Teacher, make_teacher
from megatron_phf.train.build import load_student
from megatron_phf.train.metrics import PhaseTimer
from megatron_phf.train.optimizer import StudentOptimizer
from megatron_phf.train.step import Distiller

_GIB = 2**30
_ROOT = Path(__file__).resolve().parents[3]


class Large:
    """Student, teacher, optimizer and one global batch."""

    def __init__(self, config: Config, case: dict[str, Any]) -> None:
        assert config.model.hf_model is not None
        self.config, self.case = config, case
        self.models = read_models(config)
        self.arch = self.models.student
        parallel.initialize(config.parallel)
        self.student = load_student(self.arch, config, config.model.hf_model)
        self.utilisation = Utilisation(config, self.models)
        generator = random.Random(parallel.data_parallel_rank())
        count = case["batch"] // parallel.data_parallel_size()

        def ids(length: int) -> tuple[int, ...]:
            return tuple(generator.choices(range(self.arch.vocab_size), k=length))

        self.rollouts = [
            Rollout(ids(case["prompt"]), ids(case["teacher_prompt"]), ids(case["response"]))
            for _ in range(count)
        ]
        self._steps = 0

    @functools.cached_property
    def teacher(self) -> Teacher:
        """Not where the student decodes alone."""
        return make_teacher(self.student, self.models, self.config)

    @functools.cached_property
    def optimizer(self) -> StudentOptimizer:
        """Behind the teacher, which starts at the student's weights."""
        return StudentOptimizer(self.student, self.config)

    def distiller(self, flow: bool = True) -> Distiller:
        """With the flow loss or without, around the same models and optimizer."""
        config = self.config if flow else self.config.replaced(phf_alpha=0.0)
        teacher = self.teacher
        return Distiller(config, self.models, self.student, teacher, self.optimizer)

    def step(self, distiller: Distiller, timer: PhaseTimer | None = None) -> PhaseTimer:
        """One more of them."""
        timer, self._steps = timer or PhaseTimer(), self._steps + 1
        distiller.step(self._steps, self.rollouts, timer)
        return timer


def step(large: Large) -> dict[str, Any]:
    """Steps with the flow loss and without in turn: phases, MFU, price, peak beside the formula."""
    times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    peaks, shares = [0.0], []
    warm, rounds = large.case["warm"], large.case["rounds"]
    for number in range(warm + rounds):
        for flow in (True, False) if number % 2 else (False, True):
            timer = large.step(large.distiller(flow))
            if number < warm:
                continue
            times[flow].append(timer.seconds)
            if flow:
                peaks += timer.memory_bytes.values()
                shares.append(large.utilisation.mfu(large.rollouts, timer.seconds["student"]))
    pairs = zip(times[True], times[False], strict=True)
    phases = {name: statistics.median(t[name] for t in times[True]) for name in times[True][0]}
    c, config = large.case, large.config
    fused = device.has_module("transformer_engine") or device.has_module("apex")
    width, replicas = model_dtype(config).itemsize, parallel.data_parallel_size()
    machine = Machine(width, replicas, cuda=device.has_cuda(), fused_adam=fused)
    tokens = c["micro_batch"] * (c["prompt"] + c["response"])
    return {
        "seconds": phases,
        "price": statistics.median(sum(a.values()) / sum(b.values()) for a, b in pairs),
        "mfu": None if None in shares else statistics.median(s for s in shares if s is not None),
        "peak_gib": max(parallel.max_over_ranks(peaks)) / _GIB,
        "formula_gib": sum(peak_estimate(large.models, config, machine, tokens).values()),
        "tokens": c["batch"] * (c["prompt"] + c["response"]),
    }


def synchronisations(large: Large) -> dict[str, Any]:
    """Where a step makes the host wait for the device, by phase; {} without CUDA."""
    if not device.has_cuda():
        return {}
    distiller = large.distiller()
    large.step(distiller)
    phase, places = ["batch"], Counter[tuple[str, str]]()

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "synchroniz" in str(message):
            places[phase[0], f"{os.path.relpath(filename, _ROOT)}:{lineno}"] += 1

    def entered(name: str) -> None:
        phase[0] = name

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            large.step(distiller, PhaseTimer(entered))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    phases = Counter[str]()
    for (name, _), count in places.items():
        phases[name] += count
    found = [[name, where, count] for (name, where), count in places.most_common()]
    return {"phases": dict(phases), "places": found}


def bandwidth() -> float:
    """Bytes a second that a copy in the device's memory reads and writes, the best of a few."""
    size = _GIB if device.has_cuda() else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device.device())
    target, best = torch.empty_like(source), 0.0
    for _ in range(6):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def token_seconds(seconds: Callable[[int], float], few: int, tokens: int) -> float:
    """Of one token, by batches of ``few`` tokens and of ``tokens`` more: free of the prompts.

    Where the machine is too busy for their difference to say anything, the prompts' share is in it:
    more than the truth, and never a speed that no machine has.
    """
    short, long = math.inf, math.inf
    for _ in range(3):
        short, long = min(short, seconds(few)), min(long, seconds(few + tokens))
        token, most = (long - short) / tokens, long / (few + tokens)
        if token > most / 4:
            return token
    return most


def decode(large: Large) -> dict[str, Any]:
    """Sampling in process: a short and a long batch, whose difference is free of the prompts."""
    c = large.case
    generator = random.Random(1)
    prompts = [
        generator.choices(range(large.arch.vocab_size), k=c["prompt"]) for _ in range(c["rows"])
    ]
    engine = student_engine(large.config, large.models, large.student)
    few = max(2, c["tokens"] // 8)

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(1.1, 0.95, 20, tokens, (), 1)
        device.synchronize()
        start = time.perf_counter()
        engine.generate(prompts, sampling, range(len(prompts)))
        return time.perf_counter() - start

    def tokens(engine: MegatronRollouts) -> list[list[int]]:
        sampling = SamplingParams(1.1, 0.95, 20, few, (), 2)
        responses = engine.generate(prompts, sampling, range(len(prompts)))
        return [[*response.token_ids] for response in responses]

    seconds(few)
    token = token_seconds(seconds, few, c["tokens"])
    graphs = wants_graphs(large.config, large.arch)
    plain = MegatronRollouts(large.student, large.models.vocab_size, c["rows"])
    tp = large.config.parallel.tensor_model_parallel_size
    width = model_dtype(large.config).itemsize
    length = c["prompt"] + few + c["tokens"] // 2
    config = large.config.replaced(
        max_prompt_length=length, max_new_tokens=1, global_batch_size=c["rows"],
        pipeline_model_parallel_size=1,  # a token passes all stages
    )  # fmt: skip
    cache = kv_cache_bytes(large.arch, config, Machine(width, 1))
    copied = bandwidth()
    return {
        "seconds": token,
        "tokens_per_second": c["rows"] / token,
        "memory_seconds": (large.arch.num_parameters() * width / tp + cache) / copied,
        "bandwidth": copied,
        "rows": c["rows"],
        "graphs_equal": tokens(engine) == tokens(plain) if graphs else None,
    }


KINDS = {f.__name__: f for f in (step, synchronisations, decode)}


def main() -> None:
    """All cases, which share their flags and models."""
    made: list[Large] = []

    def run(config: Config, case: dict[str, Any], _: str) -> object:
        if not made:
            made.append(Large(config, case))
        return KINDS[case["kind"]](made[0])

    cases.main(run, after=lambda: None)


if __name__ == "__main__":
    main()
