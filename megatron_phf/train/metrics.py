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
from megatron_phf.losses import flow_layer_weights, layer_loss

if TYPE_CHECKING:
    from megatron_phf.train.step import OutputLoss


class PhaseTimer:
    """Seconds of the phases of one step, the device waited for at each end."""

    def __init__(self, entered: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self._entered = entered

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time within to phase ``name``."""
        self._entered(name)
        device.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            device.synchronize()
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed


@dataclass(frozen=True)
class StepMetrics:
    """One step's numbers; means are over the global batch.

    ``opsd``: per scored token, nats; ``flow``: L_flow per sequence, None where alpha is 0 (it is
    not computed then), ``flow_direction`` also where the teacher has another hidden size;
    ``clipped_fraction``: of the vocabulary entries (entry clip) or of the
    tokens (token clip); ``teacher_entropy``: nats a token, at the loss's temperature.
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _flow_metrics(per_layer: Tensor, has_direction: bool) -> dict[str, Any]:
    """per_layer [3, L]: direction, geometry, adjacent means; adjacent[0] is unused."""
    direction = per_layer[0] if has_direction else None
    geometry, adjacent = per_layer[1], per_layer[2, 1:].tolist()
    local, pair = flow_layer_weights(len(geometry))
    layers = None if direction is None else direction.tolist()
    return {
        "flow": local * float(layer_loss(direction, geometry).sum()) + pair * sum(adjacent),
        "flow_direction": None if layers is None else _mean(layers),
        "flow_geometry": _mean(geometry.tolist()),
        "flow_adjacent": _mean(adjacent),
        "flow_direction_per_layer": layers,
        "flow_geometry_per_layer": geometry.tolist(),
        "flow_adjacent_per_pair": adjacent,
    }


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
    values: Mapping[tuple[int, int], Tensor],
    num_layers: int,
    config: Config,
    learning_rate: float,
    grad_norm: float,
    has_direction: bool = True,
) -> StepMetrics:
    """Reduce one step over the world; every rank calls it and gets the same metrics.

    ``has_direction``: whether the values have a direction term (``FlowTap.has_direction``).
    """
    sums = _local_sums(outputs, values, num_layers)
    if parallel.tensor_parallel_rank() > 0:  # they hold the same values as rank 0
        sums.zero_()
    dist.all_reduce(sums)
    opsd, clipped, entropy, tokens = (float(x) for x in sums[3 * num_layers :])
    alpha = config.method.phf_alpha
    flow = _no_flow()
    if alpha > 0:
        per_layer = sums[: 3 * num_layers].view(3, num_layers) / config.train.global_batch_size
        flow = _flow_metrics(per_layer, has_direction)
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
