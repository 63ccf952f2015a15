"""Collectives and point-to-point operations: counted, checked, and answered for the other ranks.

Each other rank is taken to hold what this one holds; a sum is left as this rank's part.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_phf.simulate import values
from megatron_phf.simulate.events import Operation, call_site
from megatron_phf.simulate.mode import Call, FakeCuda, is_on_device
from megatron_phf.simulate.torch_names import (
    FakeTensor,
    argument_names,
    finished_work,
    number_of_results,
    process_group,
)

_POINT_TO_POINT = ("send", "recv_")
# Operators whose results stay unknown; those that are not here leave their tensors as they are.
_UNKNOWN = {
    "_reduce_scatter_base_", "reduce_scatter_", "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_", "alltoall_", "recv_", "gather_", "scatter_",
}  # fmt: skip
_KNOWN = {
    "allreduce_", "broadcast_", "allgather_", "_allgather_base_", "alltoall_base_", "send",
    "barrier", "monitored_barrier_", "reduce_", "allreduce_coalesced_",
}  # fmt: skip


def communicate(sim: FakeCuda, call: Call) -> Any:
    """Log a c10d operation and fill its results where this rank can know them."""
    name = call.name
    if name not in _UNKNOWN | _KNOWN:
        sim.events.refuse(f"{name}: the simulation does not know this operation")
    group = next(g for g in map(process_group, call.args) if g is not None)
    if group.size() > 1 and call.tensors:
        _log(sim, call, group)
    if name in _UNKNOWN:
        for t in values.leaves(call.args[0]):
            _put(t, None)
    elif name in _ANSWERS:
        _ANSWERS[name](call, group)
    work = finished_work()
    return (call.args[0], work) if number_of_results(call.func) > 1 else work


def _log(sim: FakeCuda, call: Call, group: Any) -> None:
    name, ranks = call.name.strip("_"), tuple(dist.get_process_group_ranks(group))
    own = [t for t in values.leaves(call.args[0]) if isinstance(t, Tensor)]
    devices = {is_on_device(t) for t in call.tensors}
    if len(devices) > 1:
        sim.events.refuse(f"{name} of tensors on the device and on the host")
    host = True not in devices
    if host:
        sim.events.sync(f"{name} of host tensors")
    point = call.name in _POINT_TO_POINT
    # What all ranks of a group agree about: of a gather the part of one rank.
    shown = call.tensors[-1] if name.startswith(("allgather", "reduce_scatter")) else own[0]
    if name.startswith("reduce_scatter"):
        shown = own[0]
    position = next(i for i, a in enumerate(call.args) if process_group(a) is not None)
    sim.events.operations.append(
        Operation(
            phase=sim.events.phase,
            name=name,
            group=getattr(group, "group_desc", ""),
            ranks=ranks,
            shape=tuple(shown.shape),
            dtype=str(shown.dtype).removeprefix("torch."),
            bytes=max(_bytes(own), _bytes(call.tensors) - _bytes(own)),
            site=call_site(),
            host=host,
            blocking=not point and not _asynchronous(call),
            peer=ranks[call.args[position + 1]] if point else None,
            batch=sim.events.batch,
        )
    )


def _asynchronous(call: Call) -> bool:
    """Whether the caller goes on without a wait."""
    names = argument_names(call.func)
    position = names.index("async_op") if "async_op" in names else len(call.args)
    return bool(call.args[position]) if position < len(call.args) else True


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _put(target: Any, value: Tensor | None) -> None:
    if not isinstance(target, FakeTensor):
        if value is not None:
            target.copy_(value)
        return
    held = values.known(target)
    if value is None:
        values.forget(target)
    elif held is not None:
        held.copy_(value)
    elif values.small([target]):
        values.give(target, value.clone())


def _gather_lists(call: Call, group: Any) -> None:
    for outputs, tensor in zip(call.args[0], call.args[1], strict=True):
        for output in outputs:
            value = values.known(tensor)
            same = value is not None and output.shape == value.shape
            _put(output, value if same else None)


def _gather(call: Call, group: Any) -> None:
    output, tensor = call.args[:2]
    value = values.known(tensor)
    if value is not None:
        value = value.repeat(group.size(), *[1] * (value.dim() - 1)).view(output.shape)
    _put(output, value)


def _exchange(call: Call, group: Any) -> None:
    output, tensor = call.args[:2]
    value = values.known(tensor)
    _put(output, value if value is not None and value.shape == output.shape else None)


def _broadcast(call: Call, group: Any) -> None:
    """What another rank computed on its device is unknown here."""
    if call.args[2] != group.rank():
        for t in filter(is_on_device, call.args[0]):
            _put(t, None)


_ANSWERS = {
    "broadcast_": _broadcast,
    "allgather_": _gather_lists,
    "_allgather_base_": _gather,
    "alltoall_base_": _exchange,
}
