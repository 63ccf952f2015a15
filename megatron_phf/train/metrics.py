"""What a step reports: reduced over all ranks, the same numbers in any layout."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout, written_stop
from megatron_phf.hidden.spec import flow_spec, weighted_terms
from megatron_phf.runtime import device, parallel

if TYPE_CHECKING:
    from megatron_phf.hidden.tap import FlowTap


@dataclass(frozen=True)
class OutputLoss:
    """What the last stage knows of one microbatch's output loss; each [n], in nats."""

    per_token: Tensor
    clipped: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    agreement: Tensor
    sequence: Tensor  # row of each token in its microbatch, on the host


class PhaseTimer:
    """Seconds and memory of the phases of one step, the device waited for at the end of each.

    They follow one another: what is left of the device's work when a phase begins is next to none.

    ``memory_bytes``: the phase's peak on CUDA, the resident set at its end on CPU.
    """

    def __init__(self, entered: Callable[[str], None] = lambda name: None, where: str = "") -> None:
        """``entered`` hears of each phase, its name behind ``where``."""
        self.seconds: dict[str, float] = {}
        self.memory_bytes: dict[str, int] = {}
        self._entered, self._where = entered, where

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time within to phase ``name``."""
        self._entered(self._where + name)
        device.start_peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            device.synchronize()
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            peak = device.peak_since_start()
            self.memory_bytes[name] = max(self.memory_bytes.get(name, 0), peak)

    def split(self, name: str, part: str, seconds: float) -> None:
        """Take ``seconds`` of phase ``name`` for a ``part`` of it."""
        self.seconds[part] = seconds
        self.seconds[name] = max(self.seconds[name] - seconds, 0.0)


@dataclass(frozen=True)
class StepMetrics:
    """One step's numbers; means are over the global batch.

    ``opsd``: per scored token, nats; ``flow``: L_flow per sequence, None where alpha is 0 (it is
    not computed then); ``flow_terms``: ``flow_<term>`` of each of the run's terms and its list by
    layer or pair, None also where the teacher has another hidden size and the term needs the
    student's; ``clipped_fraction``: of the vocabulary entries (entry clip) or of the tokens (token
    clip); ``teacher_entropy``, ``student_entropy``: nats a token, at the loss's temperature;
    ``teacher_agreement``: share of the tokens where both models have the same most probable one;
    None of what is the teacher's where it has read nothing.
    """

    loss: float
    opsd: float
    flow: float | None
    flow_terms: dict[str, Any]
    grad_norm: float
    learning_rate: float
    clipped_fraction: float
    clip_mode: str
    teacher_entropy: float | None
    student_entropy: float
    teacher_agreement: float | None
    rollout_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            flat |= value if name in ("flow_terms", "extra") else {name: value}
        return flat


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _flow_metrics(per_layer: Tensor | None, tap: FlowTap, config: Config) -> dict[str, Any]:
    """per_layer [T, L]: means of the tap's terms (None: not computed) -> the fields of the flow.

    On the host.  A term over pairs is that with the layer before: its first number is unused.
    """
    flow, rows = None, {}
    if per_layer is not None:
        skipped = [term.over == "pair" for term in tap.terms]
        weights = [
            [0.0] * skip + [*tap.weights[term.name]]
            for term, skip in zip(tap.terms, skipped, strict=True)
        ]
        flow = float((per_layer.new_tensor(weights) * per_layer).sum())
        for term, values, skip in zip(tap.terms, per_layer.tolist(), skipped, strict=True):
            rows[term.name] = values[skip:]
    means, lists = {}, {}
    for term, _ in weighted_terms(flow_spec(config).terms):
        numbers = rows.get(term.name)
        means[f"flow_{term.name}"] = None if numbers is None else _mean(numbers)
        lists[f"flow_{term.name}_per_{term.over}"] = numbers
    return {"flow": flow, "flow_terms": {**means, **lists}}


def _flow_sums(values: Mapping[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    """Terms [T, b] by (microbatch, layer) -> their sums over sequences [T] by layer."""
    layers = sorted({layer for _, layer in values})
    total: Tensor | float = 0.0
    # All layers of a microbatch at once: a kernel for each of both would be many.
    for microbatch in sorted({microbatch for microbatch, _ in values}):
        terms = torch.stack([values[microbatch, layer] for layer in layers])
        total = total + terms.double().sum(-1)
    return dict(zip(layers, total, strict=True)) if isinstance(total, Tensor) else {}


def _local_sums(
    outputs: Sequence[OutputLoss], tap: FlowTap, num_layers: int
) -> tuple[Tensor, Tensor]:
    """Float64 sums here: the tap's terms by layer [T, L]; ``OutputLoss``'s and tokens [6]."""
    flow = torch.zeros(len(tap.terms), num_layers, dtype=torch.float64, device=device.device())
    # Context-parallel ranks have the same flow terms, and tokens of their own.
    if parallel.context_parallel_rank() == 0:
        for layer, sums in _flow_sums(tap.values).items():
            flow[:, layer - 1] = sums
    output = torch.zeros(6, dtype=torch.float64, device=device.device())
    for o in outputs:
        seen = o.teacher_entropy, o.student_entropy, o.agreement
        terms = torch.stack((o.per_token, o.clipped, *seen, torch.ones_like(o.clipped)))
        output += terms.double().sum(-1)
    return flow, output


def summarize(
    outputs: Sequence[OutputLoss],
    num_layers: int,
    config: Config,
    learning_rate: float,
    grad_norm: float,
    tap: FlowTap,
    sequences: int,
) -> StepMetrics:
    """Reduce one step over the world; every rank calls it and gets the same metrics.

    Where none of the rollouts is kept, means are of nothing (NaN) and the flow's are not known.
    """
    flow, output = _local_sums(outputs, tap, num_layers)
    sums = torch.cat((flow.flatten(), output))
    if parallel.tensor_parallel_rank() > 0:  # they hold the same values as rank 0
        sums.zero_()
    dist.all_reduce(sums)
    sums = sums.cpu()
    *means, count = sums[-6:].tolist()
    tokens = count or math.nan
    opsd, clipped, teacher_entropy, student_entropy, agreement = (x / tokens for x in means)
    alpha = config.method.phf_alpha
    per_layer = sums[:-6].view_as(flow) / sequences if alpha > 0 and sequences else None
    fields = _flow_metrics(per_layer, tap, config)
    return StepMetrics(
        loss=config.method.opsd_weight * opsd + alpha * (fields["flow"] or 0.0),
        opsd=opsd,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        clipped_fraction=clipped,
        clip_mode=config.method.opsd_clip_mode,
        teacher_entropy=None if math.isnan(teacher_entropy) else teacher_entropy,
        student_entropy=student_entropy,
        teacher_agreement=None if math.isnan(agreement) else agreement,
        rollout_tokens=round(count),
        **fields,
    )


def response_lengths(rollouts: Sequence[Rollout], stop_ids: Sequence[int] | None) -> dict[str, Any]:
    """Tokens of the global batch's responses, scored or not: mean, min, max; every rank calls it.

    ``cut``: share that ended without a stop token, for want of room (None without ``stop_ids``).
    """
    stops = () if stop_ids is None else stop_ids
    local = [
        (len(r.response_ids), not written_stop(r.response_ids, r.response_mask, stops))
        for r in rollouts
    ]
    every = [each for part in parallel.gather_over_data_parallel(local) for each in part]
    lengths = [length for length, _ in every]
    cut = None if stop_ids is None else _mean([cut for _, cut in every])
    return {"mean": _mean(lengths), "min": min(lengths), "max": max(lengths), "cut": cut}


def policy_lag(iteration: int, rollouts: Sequence[Rollout]) -> dict[str, int]:
    """How many steps the weights that sampled are behind those that train, at most.

    Nothing where no rollout of the global batch says.  Every rank calls it.
    """
    local = [iteration - r.policy_version for r in rollouts if r.policy_version is not None]
    lags = [lag for part in parallel.gather_over_data_parallel(local) for lag in part]
    return {"policy_lag": max(lags)} if lags else {}


def rollout_staleness(iteration: int, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Steps that the weights which began each rollout are behind those that train; every rank.

    ``ended``: the same, at most, of those that ended one.
    """
    local = [
        (iteration - r.policy_version, iteration - (r.policy_version_end or r.policy_version))
        for r in rollouts
        if r.policy_version is not None
    ]
    ages = [pair for part in parallel.gather_over_data_parallel(local) for pair in part]
    if not ages:
        return {}
    begun, ended = zip(*ages, strict=True)
    return {"rollout_staleness": {"mean": _mean(begun), "max": max(begun), "ended": max(ended)}}


def kept_rollouts(rollouts: Sequence[Rollout], config: Config) -> dict[str, int]:
    """How many of the global batch's are trained on, where some may not be; every rank calls it."""
    if config.rollout.keep_rollouts == "all":
        return {}
    return {"rollouts_kept": sum(parallel.gather_over_data_parallel(sum(r.kept for r in rollouts)))}


def timing(timer: PhaseTimer, tokens: int) -> dict[str, Any]:
    """Seconds (rank 0's) and memory (the greatest rank's) of a step; every rank calls it."""
    memory = timer.memory_bytes
    peaks = parallel.max_over_ranks([device.peak_memory_bytes(), *memory.values()])
    return {
        "seconds": timer.seconds,
        "tokens_per_second": tokens / sum(timer.seconds.values()),
        "memory_bytes": dict(zip(memory, map(int, peaks[1:]), strict=True)),
        "peak_memory_bytes": int(max(peaks)),
    }
