"""What a step reports: reduced over all ranks, the same numbers in any layout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf import device, parallel
from megatron_phf.config import Config
from megatron_phf.data.replay_file import Rollout, written_stop

if TYPE_CHECKING:
    from megatron_phf.model.flow_tap import FlowTap


@dataclass(frozen=True)
class OutputLoss:
    """What the last stage knows of one microbatch's output loss; each [n], in nats."""

    per_token: Tensor
    clipped: Tensor
    teacher_entropy: Tensor
    sequence: Tensor  # row of each token in its microbatch


class PhaseTimer:
    """Seconds and memory of the phases of one step, the device waited for at each end.

    ``memory_bytes``: the phase's peak on CUDA, the resident set at its end on CPU.
    """

    def __init__(self, entered: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self.memory_bytes: dict[str, int] = {}
        self._entered = entered

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time within to phase ``name``."""
        self._entered(name)
        device.synchronize()
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


@dataclass(frozen=True)
class StepMetrics:
    """One step's numbers; means are over the global batch.

    ``opsd``: per scored token, nats; ``flow``: L_flow per sequence, None where alpha is 0 (it is
    not computed then), ``flow_direction`` also where the teacher has another hidden size, geometry
    and adjacent where states are matched pointwise; ``clipped_fraction``: of the vocabulary entries
    (entry clip) or of the tokens (token clip); ``teacher_entropy``: nats a token, at the loss's
    temperature.
    """

    loss: float
    opsd: float
    flow: float | None
    flow_direction: float | None
    flow_geometry: float | None
    flow_adjacent: float | None
    flow_direction_per_layer: list[float] | None
    flow_geometry_per_layer: list[float] | None
    flow_adjacent_per_pair: list[float] | None
    grad_norm: float
    learning_rate: float
    clipped_fraction: float
    clip_mode: str
    teacher_entropy: float
    rollout_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        values = {k: v for k, v in vars(self).items() if k != "extra"}
        return {**values, **self.extra}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _flow_metrics(per_layer: Tensor, tap: FlowTap) -> dict[str, Any]:
    """per_layer [3, L]: direction, geometry, adjacent means; adjacent[0] is unused."""
    w = tap.weights
    weights = per_layer.new_tensor([w.direction, w.geometry, [0.0, *w.adjacent]])
    direction, geometry, adjacent = per_layer[0], per_layer[1], per_layer[2, 1:]
    parts = {
        ("direction", "layer"): direction if tap.has_direction else None,
        ("geometry", "layer"): None if tap.pointwise else geometry,
        ("adjacent", "pair"): None if tap.pointwise else adjacent,
    }
    metrics: dict[str, Any] = {"flow": float((weights * per_layer).sum())}
    for (term, by), values in parts.items():
        numbers = None if values is None else values.tolist()
        metrics[f"flow_{term}"] = None if numbers is None else _mean(numbers)
        metrics[f"flow_{term}_per_{by}"] = numbers
    return metrics


def _no_flow() -> dict[str, Any]:
    names = [f.name for f in StepMetrics.__dataclass_fields__.values()]
    return {name: None for name in names if name.startswith("flow")}


def _local_sums(
    outputs: Sequence[OutputLoss], values: Mapping[tuple[int, int], Tensor], num_layers: int
) -> Tensor:
    """[3 L + 4] float64: flow terms of the layers here, then opsd, clipped, entropy, tokens."""
    flow = torch.zeros(3, num_layers, dtype=torch.float64, device=device.device())
    # Context-parallel ranks have the same flow terms, and tokens of their own.
    for (_, layer), terms in (values if parallel.context_parallel_rank() == 0 else {}).items():
        flow[:, layer - 1] += terms.double().sum(-1)
    output = torch.zeros(4, dtype=torch.float64, device=device.device())
    for o in outputs:
        terms = torch.stack((o.per_token, o.clipped, o.teacher_entropy, torch.ones_like(o.clipped)))
        output += terms.double().sum(-1)
    return torch.cat((flow.flatten(), output))


def summarize(
    outputs: Sequence[OutputLoss],
    num_layers: int,
    config: Config,
    learning_rate: float,
    grad_norm: float,
    tap: FlowTap,
) -> StepMetrics:
    """Reduce one step over the world; every rank calls it and gets the same metrics."""
    sums = _local_sums(outputs, tap.values, num_layers)
    if parallel.tensor_parallel_rank() > 0:  # they hold the same values as rank 0
        sums.zero_()
    dist.all_reduce(sums)
    opsd, clipped, entropy, tokens = (float(x) for x in sums[3 * num_layers :])
    alpha = config.method.phf_alpha
    flow = _no_flow()
    if alpha > 0:
        per_layer = sums[: 3 * num_layers].view(3, num_layers) / config.train.global_batch_size
        flow = _flow_metrics(per_layer, tap)
    return StepMetrics(
        loss=opsd / tokens + alpha * (flow["flow"] or 0.0),
        opsd=opsd / tokens,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        clipped_fraction=clipped / tokens,
        clip_mode=config.method.opsd_clip_mode,
        teacher_entropy=entropy / tokens,
        rollout_tokens=round(tokens),
        **flow,
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
