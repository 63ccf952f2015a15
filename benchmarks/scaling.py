"""How a training step's time and memory grow: laws fitted, beside what is expected of them.

    python -m benchmarks.scaling '{"axis": "response", "rounds": 3}'
    torchrun --nproc-per-node 2 -m benchmarks.scaling '{"axis": "processes", "rounds": 3}'

Replayed rollouts, fp32, 4 layers x 256, vocabulary 8,000.  Expected: tokens of the response, linear
(matrix products, output head) with a quadratic part (attention), memory linear; positions of the
flow window, linear (the transitions) with a quadratic part (the products of all pairs); layers,
linear with a constant (embedding, head, optimizer of both).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.fits import polynomial, power_law
from benchmarks.harness import (
    Spread,
    from_rank_0,
    interleaved,
    one_process,
    peak_over_start,
    report,
    scratch,
)
from benchmarks.models import make_qwen3
from benchmarks.step import distiller_of, write_replay
from megatron_phf.config.settings import ParallelConfig
from megatron_phf.losses import flow_loss
from megatron_phf.runtime import parallel
from megatron_phf.train.metrics import PhaseTimer

VOCABULARY, HIDDEN, LAYERS, BATCH = 8000, 256, 4, 2
RESPONSES, WINDOWS, DEPTHS = (64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024), (1, 2, 4, 8)


@contextlib.contextmanager
def _place(tensor_parallel: int = 1) -> Iterator[Path]:
    """Process groups and a directory."""
    with scratch() as directory, one_process():
        parallel.initialize(ParallelConfig(tensor_model_parallel_size=tensor_parallel))
        yield directory


def _step(
    directory: Path, response: int, layers: int = LAYERS, tensor_parallel: int = 1
) -> Callable[[], Any]:
    """A step of OPSD on responses of one length, ``BATCH`` a data-parallel rank."""
    model = from_rank_0(
        lambda: make_qwen3(
            directory / f"model{layers}",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    batch = BATCH * parallel.data_parallel_size()
    path = directory / f"replay{response}"
    replay = from_rank_0(lambda: write_replay(path, batch, response, VOCABULARY))
    flags = {
        "--micro-batch-size": BATCH,
        "--phf-alpha": 0,
        "--tensor-model-parallel-size": tensor_parallel,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    distiller, rollouts = distiller_of(model, replay, batch, *words)
    return lambda: distiller.step(1, rollouts, PhaseTimer())


def _timed(steps: dict[int, Callable[[], Any]], rounds: int, degree: int) -> dict[str, Any]:
    """Seconds by size, and the laws through their medians."""
    times = interleaved({str(n): step for n, step in steps.items()}, rounds)
    medians = [statistics.median(values) for values in times.values()]
    return {
        "seconds": {name: Spread.of(values).as_json() for name, values in times.items()},
        "power_law": power_law(list(steps), medians),
        "polynomial": polynomial(list(steps), medians, degree),
    }


def response(rounds: int) -> dict[str, Any]:
    """Seconds of a step by tokens of its responses."""
    with _place() as directory:
        return _timed({n: _step(directory, n) for n in RESPONSES}, rounds, degree=2)


def memory(response: int) -> dict[str, Any]:
    """Peak of a first step beyond weights and gradients, in this fresh process."""
    with _place() as directory:
        _step(directory, 32)()  # the math library's own buffers
        return {"peak_bytes": peak_over_start(_step(directory, response))}


def layers(rounds: int) -> dict[str, Any]:
    """Seconds of a step by layers."""
    with _place() as directory:
        return _timed({n: _step(directory, 128, n) for n in DEPTHS}, rounds, degree=1)


def _flow(window: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(window)
    shape = (BATCH, window, HIDDEN)
    student, teacher = (
        [torch.randn(shape, generator=generator) for _ in range(LAYERS)] for _ in range(2)
    )
    for hidden in student:
        hidden.requires_grad_()
    valid = torch.ones(BATCH, window, dtype=torch.bool)
    return lambda: flow_loss(student, teacher, valid).loss.backward()


def window(rounds: int) -> dict[str, Any]:
    """Seconds of the flow loss, forward and backward, by positions of its window."""
    return _timed({n: _flow(n) for n in WINDOWS}, 5 * rounds, degree=2)


def processes(rounds: int, tensor_parallel: int = 1) -> dict[str, float]:
    """Under torchrun: seconds of a step of ``BATCH`` rollouts a data-parallel rank, one thread."""
    torch.set_num_threads(1)
    with _place(tensor_parallel) as directory:
        step = _step(directory, 256, tensor_parallel=tensor_parallel)
        return {"seconds": statistics.median(interleaved({"": step}, rounds)[""])}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    axes = {f.__name__: f for f in (response, memory, layers, window, processes)}
    report(axes[arguments.pop("axis")](**arguments))
