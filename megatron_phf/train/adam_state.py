"""Adam's state in a checkpoint, for torch's Adam and for NVIDIA's fused ones alike.

Moments are the same in all of them.  torch's counts a step a parameter, which megatron-core saves
as one ``common_step`` (its distributed optimizer: as a ``step`` a group); Transformer Engine's and
apex's count a step a group.  Each has settings in its groups that the others lack.
"""

from __future__ import annotations

from typing import Any

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")


def _counts_by_parameter(adam: torch.optim.Optimizer) -> bool:
    return isinstance(adam, torch.optim.Adam)


def allocate(adam: torch.optim.Optimizer) -> None:
    """Zero moments, which Adam makes at its first step; megatron-core needs them before."""
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        state = adam.state[parameter]
        if not state:
            if _counts_by_parameter(adam):
                state["step"] = torch.zeros(())
            state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})


def convert(adam: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Lay out ``state``, one of megatron-core's optimizers as read, as it is with ``adam`` in it.

    In place.  Settings that only ``adam`` knows keep their values; it reads no others.
    """
    inner = state.get("optimizer", state)  # under mixed precision beside the fp32 weights
    moments, groups = inner.get("state"), inner["param_groups"]
    steps = [int(group.pop("step")) for group in groups if group.get("step") is not None]
    if moments is not None and "common_step" in moments:
        steps.append(int(moments.pop("common_step")))
    step = max(steps, default=0)
    for group in groups:
        for name, value in adam.defaults.items():
            group.setdefault(name, value)
    if not _counts_by_parameter(adam):
        for group in groups:
            group["step"] = step
    elif moments is not None:
        moments["common_step"] = torch.tensor(float(step))
    else:  # the distributed optimizer's, whose moments are read apart
        for group in groups:
            group["step"] = float(step)
