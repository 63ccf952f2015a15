"""What a simulated rank took, as JSON holds it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state

from megatron_phf.estimate.memory import Machine, phase_estimates
from megatron_phf.runtime import parallel
from megatron_phf.simulate.events import Operation
from megatron_phf.simulate.job import Job
from megatron_phf.simulate.memory import DeviceMemory
from megatron_phf.simulate.mode import FakeCuda

_MOST_LINES = 20  # of a phase's large allocations


def found(sim: FakeCuda, job: Job, known: dict[str, Any], tokens: int) -> dict[str, Any]:
    """All that was counted, ``known`` with it.

    Args:
        tokens: padded ones of the student's largest microbatch; 0: it was not reached.
    """
    events = sim.events
    return {
        **known,
        "place": _place(),
        "operations run": events.count,
        "memory": {**known.get("memory", {}), **peaks(sim.memory)},
        "formula": _formula(job, tokens) if tokens else {},
        "communication": _by_group(events.operations),
        "syncs": [[*key, n] for key, n in events.syncs.most_common()],
        "made up": [[*key, n] for key, n in events.made_up.most_common()],
        "refused": [[*key, n] for key, n in events.refused.items()],
        "log": [dataclasses.asdict(o) for o in events.operations],
    }


def peaks(memory: DeviceMemory) -> dict[str, Any]:
    """By phase: bytes, bytes of each holder, and of the lines that hold most."""
    phases = {}
    for phase, size in memory.peaks.items():
        lines = sorted(memory.lines[phase].items(), key=lambda item: -item[1])[:_MOST_LINES]
        large = [[*where, n] for where, n in lines if n]
        phases[phase] = {"bytes": size, "held": memory.held[phase], "large": large}
    return phases


def _formula(job: Job, tokens: int) -> dict[str, dict[str, float]]:
    """By phase and holder, GiB; of the phases that were simulated."""
    stage = parallel.pipeline_rank()
    machine = Machine(2, parallel.data_parallel_size(), fused_adam=job.engine_stub)
    phases = phase_estimates(job.models, job.config, machine, tokens, stage)
    return {phase: parts for phase, parts in phases.items() if job.decode or phase != "decode"}


def _place() -> dict[str, list[int]]:
    """(rank, size) of each kind of parallelism."""
    if not parallel_state.model_parallel_is_initialized():
        return {}
    return {
        "TP": [parallel.tensor_parallel_rank(), parallel.tensor_parallel_size()],
        "PP": [parallel.pipeline_rank(), parallel.pipeline_size()],
        "CP": [parallel.context_parallel_rank(), parallel.context_parallel_size()],
        "DP": [parallel.data_parallel_rank(), parallel.data_parallel_size()],
        "EP": [parallel.expert_parallel_rank(), parallel.expert_parallel_size()],
    }


def _by_group(operations: Sequence[Operation]) -> list[list[Any]]:
    """[phase, operation, group, its size, in host memory, number, bytes] of each kind."""
    sums: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for o in operations:
        entry = sums[o.phase, o.name, o.group, len(o.ranks), o.host]
        entry[0] += 1
        entry[1] += o.bytes
    return [[*key, *sizes] for key, sizes in sorted(sums.items(), key=lambda kv: -kv[1][1])]
