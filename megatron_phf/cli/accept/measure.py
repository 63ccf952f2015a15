"""Measurements of the large model, by the product's own parts, in one process a GPU.

    torchrun --nproc-per-node N -m megatron_phf.cli.accept.measure CASES.json OUTPUT_DIR

Each case leaves NAME.json as soon as it is done.  Replayed random rollouts of one length: no
padding and no luck of the draw in a figure.
"""

from __future__ import annotations

import gc
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
import torch.distributed as dist

from megatron_phf.cli import cases
from megatron_phf.cli.accept.large import Large
from megatron_phf.config.settings import Config
from megatron_phf.estimate.memory import Machine, kv_cache_bytes, peak_estimate
from megatron_phf.estimate.utilisation import Utilisation
from megatron_phf.losses import DivergenceSpec, chunked_divergence
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, parallel
from megatron_phf.train.metrics import PhaseTimer

_GIB = 2**30
_ROOT = Path(__file__).resolve().parents[3]


def step(large: Large) -> dict[str, Any]:
    """Steps with the flow loss and without in turn: phases, MFU, price, peak beside the formula."""
    c, flows = large.case, large.case["flows"]
    times: dict[bool, list[dict[str, float]]] = {flow: [] for flow in flows}
    shares, utilisation = [], Utilisation(large.config, large.models)
    peaks, warm = [0.0], c["warm"]
    torch.cuda.empty_cache()  # of what ran before
    for number in range(warm + c["rounds"]):
        for flow in flows if number % 2 else flows[::-1]:
            timer = PhaseTimer()
            if c["sample"]:
                with timer.phase("rollout"):
                    large.sample()
            large.step(large.distiller(flow), timer)
            if number < warm:
                continue
            times[flow].append(timer.seconds)
            if flow:
                peaks += timer.memory_bytes.values()
                shares.append(utilisation.mfu(large.rollouts, timer.seconds["student"]))
    reserved = torch.cuda.memory_reserved() or max(peaks)
    traces = [_trace(large, flow) for flow in flows]
    phases = {name: statistics.median(t[name] for t in times[True]) for name in times[True][0]}
    config, price = large.config, None
    if False in times:
        pairs = zip(times[True], times[False], strict=True)
        price = statistics.median(sum(a.values()) / sum(b.values()) for a, b in pairs)
    fused = device.has_module("transformer_engine") or device.has_module("apex")
    width, replicas = model_dtype(config).itemsize, parallel.data_parallel_size()
    machine = Machine(width, replicas, cuda=device.has_cuda(), fused_adam=fused)
    tokens, decode = config.batching.max_tokens_per_microbatch, bool(c["sample"])
    formula = peak_estimate(large.models, config, machine, tokens, decode)
    return {
        "seconds": phases,
        "price": price,
        "mfu": None if None in shares else statistics.median(s for s in shares if s is not None),
        "peak_gib": max(parallel.max_over_ranks(peaks)) / _GIB,
        "reserved_gib": max(parallel.max_over_ranks([reserved])) / _GIB,
        "formula_gib": sum(formula.values()),
        "tokens": c["batch"] * (c["prompt"] + c["response"]),
        "traces": traces,
    }


def _trace(large: Large, flow: bool) -> str:
    """The profiler's trace of one step, rank 0's, for ui.perfetto.dev."""
    path = f"{large.case['trace']}_{'flow' if flow else 'opsd'}.json.gz"
    with torch.profiler.profile() as profiler:
        large.step(large.distiller(flow))
    if parallel.is_first_rank():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        profiler.export_chrome_trace(path)
    return path


def head(large: Large) -> dict[str, Any]:
    """Seconds of output head and divergence, forward and backward, by tokens of a chunk."""
    weight, count = large.student[-1].output_weight().detach(), large.config.batching
    generator = torch.Generator(device.device()).manual_seed(1)
    size = (count.max_tokens_per_microbatch, weight.shape[1])
    student, teacher = (
        torch.randn(size, generator=generator, device=weight.device, dtype=weight.dtype)
        for _ in range(2)
    )
    student.requires_grad_()
    ones, seconds = torch.ones(size[0], device=weight.device), {}
    for chunk in large.case["chunks"]:
        spec = DivergenceSpec(beta=0.0)
        for _ in range(3):  # the last counts: the first loads kernels
            device.synchronize()
            start = time.perf_counter()
            chunked_divergence(
                student, teacher, weight, weight, ones, spec, chunk_tokens=chunk
            ).loss.backward()
            device.synchronize()
            seconds[chunk] = time.perf_counter() - start
    return {"tokens": size[0], "seconds": seconds}


def synchronisations(large: Large) -> dict[str, Any]:
    """Where a step makes the host wait for the device, by phase."""
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
    most = [[name, where, count] for (name, where), count in places.most_common()]
    return {"phases": dict(phases), "places": most}


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
    engine = large.engine("on" if device.has_cuda() else "off", c["rows"])
    few = max(2, c["tokens"] // 8)

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(1.1, 0.95, 20, tokens, (), 1)
        device.synchronize()
        start = time.perf_counter()
        engine.generate(prompts, sampling, range(len(prompts)))
        return time.perf_counter() - start

    seconds(few)
    token = token_seconds(seconds, few, c["tokens"])
    tp = large.config.parallel.tensor_model_parallel_size
    width = model_dtype(large.config).itemsize
    length = c["prompt"] + few + c["tokens"] // 2
    config = large.config.replaced(
        max_prompt_length=length, max_new_tokens=1, global_batch_size=c["rows"],
    )  # fmt: skip
    cache = kv_cache_bytes(large.arch, config, Machine(width, 1))
    copied = bandwidth()
    return {
        "seconds": token,
        "tokens_per_second": c["rows"] / token,
        "memory_seconds": (large.arch.num_parameters() * width / tp + cache) / copied,
        "bandwidth": copied,
        "rows": c["rows"],
    }


def graphs(large: Large) -> dict[str, Any]:
    """How many rows get other tokens from captured steps than from launched ones."""
    c, generator = large.case, random.Random(1)
    prompts = [
        generator.choices(range(large.arch.vocab_size), k=c["prompt"]) for _ in range(c["rows"])
    ]
    sampling = SamplingParams(1.1, 0.95, 20, c["tokens"], (), 1)
    responses = [
        large.engine(mode, c["rows"]).generate(prompts, sampling, range(len(prompts)))
        for mode in ("off", "on")
    ]
    pairs = zip(*responses, strict=True)
    different = sum(list(a.token_ids) != list(b.token_ids) for a, b in pairs)
    return {"rows": c["rows"], "tokens": c["tokens"], "different": different}


def all_reduce() -> dict[str, Any]:
    """Of as many numbers as a bucket of gradients has, right on every rank."""
    numbers = torch.ones(2**24 if device.has_cuda() else 2**10, device=device.device())
    dist.all_reduce(numbers)
    world = dist.get_world_size()
    if not bool((numbers == world).all()):
        raise ValueError(f"an all-reduce of ones over {world} processes gave {numbers[0]}")
    return {"processes": world, "device": device.describe()}


KINDS = {f.__name__: f for f in (step, synchronisations, head, decode, graphs)}


def main() -> None:
    """All cases; neighbours with the same flags share their models."""
    made: dict[tuple[str, ...], Large] = {}

    def run(config: Config, case: dict[str, Any], _: str) -> object:
        if case["kind"] == "all_reduce":
            return all_reduce()
        argv = tuple(case["argv"])
        if argv not in made:
            made.clear()
            gc.collect()
            parallel.destroy_model_parallel()
            torch.cuda.empty_cache()
            made[argv] = Large(config, case)
        made[argv].case = case
        return KINDS[case["kind"]](made[argv])

    cases.main(run, after=lambda: None)


if __name__ == "__main__":
    main()
