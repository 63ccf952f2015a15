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


def restored(adam: torch.optim.Optimizer, asked: Any, saved: Any, step: int) -> dict[str, Any]:
    """``asked`` of one of megatron-core's optimizers, with the tensors of ``saved``.

    Settings are this run's: a checkpoint of another layout may have them in other groups, or in
    another number of optimizers (experts under expert parallelism have one of their own).
    """
    state = _filled(asked, saved)
    inner = state.get("optimizer", state)  # under mixed precision beside the fp32 weights
    moments, groups = inner.get("state"), inner["param_groups"]
    if moments is not None and _counts_by_parameter(adam):
        moments["common_step"] = torch.tensor(float(step))
    else:  # the distributed optimizer reads moments apart
        for group in groups:
            group["step"] = float(step) if _counts_by_parameter(adam) else step
    return state


def steps_taken(saved: Any) -> int:
    """The steps that a checkpoint's optimizers have counted, wherever they did."""
    if isinstance(saved, list):
        return max(map(steps_taken, saved), default=0)
    if not isinstance(saved, dict):
        return 0
    counts = [int(saved[name]) for name in ("step", "common_step") if saved.get(name) is not None]
    return max([*counts, *map(steps_taken, saved.values())], default=0)


def _filled(asked: Any, saved: Any) -> Any:
    """Plain values of ``asked``; what it asked a checkpoint for stands in ``saved``."""
    if isinstance(asked, dict):
        there = saved if isinstance(saved, dict) else {}
        return {name: _filled(value, there.get(name)) for name, value in asked.items()}
    if isinstance(asked, list):
        each = saved if isinstance(saved, list) else [None] * len(asked)
        return [_filled(*pair) for pair in zip(asked, each, strict=True)]
    plain = asked is None or isinstance(asked, bool | int | float | str | tuple | torch.Tensor)
    return asked if plain else saved
