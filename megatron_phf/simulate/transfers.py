"""Operations at which the host waits for the device, or hands it something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_phf.simulate import values
from megatron_phf.simulate.mode import Call, FakeCuda, Handler, is_on_device
from megatron_phf.simulate.torch_names import FakeTensor, is_view

_MASKS = (torch.bool, torch.uint8)


def _item(sim: FakeCuda, call: Call) -> Any:
    tensor = call.args[0]
    if is_on_device(tensor):
        sim.events.sync("item")
    return sim.host_value(tensor, "item").item()


def _is_nonzero(sim: FakeCuda, call: Call) -> Any:
    sim.events.sync("bool")
    return bool(sim.host_value(call.args[0], "bool"))


def _equal(sim: FakeCuda, call: Call) -> Any:
    sim.events.sync("equal")
    first, second = (values.known(t) for t in call.args[:2])
    if first is None or second is None:
        sim.events.make_up("equal")
        return True
    return torch.equal(first, second)


def _to(sim: FakeCuda, call: Call) -> Any:
    """Of a tensor to another device; dtypes alone are like any other operation."""
    tensor, device = call.args[0], call.kwargs.get("device")
    here = "cuda" if is_on_device(tensor) else "cpu"
    if device is None or torch.device(device).type == here:
        return NotImplemented
    waits = not call.kwargs.get("non_blocking", False)
    if torch.device(device).type == "cpu":
        return _to_host(sim, call, waits)
    if waits:
        sim.events.sync("to the device")
    out = sim.run(call)
    value = values.known(tensor)
    if value is not None and values.small([value]):
        values.give(out, value.detach().clone().to(out.dtype))
    return out


def _to_host(sim: FakeCuda, call: Call, waits: bool) -> Any:
    tensor = call.args[0]
    if waits:
        sim.events.sync("to the host")
    if values.known(tensor) is None and tensor.numel() > 4096:
        return NotImplemented  # a weight: its copy has no memory either
    value = sim.host_value(tensor, "to the host")
    return value.to(call.kwargs.get("dtype") or tensor.dtype)


def _copy(sim: FakeCuda, call: Call) -> Any:
    target, source = call.args[:2]
    lazy = call.args[2] if len(call.args) > 2 else call.kwargs.get("non_blocking", False)
    if is_on_device(target) != is_on_device(source) and not lazy:
        sim.events.sync("copy to the device" if is_on_device(target) else "copy to the host")
    value = values.known(source)
    if not isinstance(target, FakeTensor):
        return target.copy_(sim.host_value(source, "copy"))
    whole = values.known(target) is None and not is_view(target) and values.small([target])
    if value is None or not whole:
        return NotImplemented
    sim.run(call)
    return values.give(target, value.expand(target.shape).to(target.dtype).clone())


def _mask(sim: FakeCuda, tensor: Any, kind: str) -> Tensor:
    """A mask's value; nothing is chosen where it is unknown."""
    sim.events.sync(kind)
    value = values.known(tensor)
    if value is None:
        sim.events.make_up(kind)
        value = torch.zeros(tensor.shape, dtype=torch.bool)
    return value


def _nonzero(sim: FakeCuda, call: Call) -> Any:
    return sim.like(_mask(sim, call.args[0], "nonzero").nonzero())


def _masked_select(sim: FakeCuda, call: Call) -> Any:
    tensor, mask = call.args[0], _mask(sim, call.args[1], "masked_select")
    value = values.known(tensor)
    if value is not None:
        return sim.like(value.masked_select(mask))
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return sim.empty(int(mask.expand(shape).sum()), dtype=tensor.dtype)


def _without_masks(sim: FakeCuda, indices: Any) -> list[Any] | None:
    """Masks as the positions that they choose, which waits for each; None: there are none."""
    if not any(isinstance(i, Tensor) and i.dtype in _MASKS for i in indices):
        return None
    out: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in _MASKS:
            chosen = _mask(sim, index, "index by a mask").nonzero()
            out += [sim.like(column.contiguous()) for column in chosen.unbind(1)]
        else:
            out.append(index)
    return out


def _index(sim: FakeCuda, call: Call) -> Any:
    indices = _without_masks(sim, call.args[1])
    return NotImplemented if indices is None else sim.again(call.func, call.args[0], indices)


def _index_put(sim: FakeCuda, call: Call) -> Any:
    target, indices, *rest = call.args
    masks = [i for i in indices if isinstance(i, Tensor)]
    number = not isinstance(rest[0], FakeTensor) and rest[0].numel() == 1
    if number and len(masks) == 1 and masks[0].dtype is torch.bool:
        # CUDA fills by the mask, which does not wait.
        value, mask = values.known(target), values.known(masks[0])
        if value is not None and mask is not None:
            call.func(value, [None if i is None else values.known(i) for i in indices], *rest)
        else:
            values.forget(target)
        return target
    chosen = _without_masks(sim, indices)
    return NotImplemented if chosen is None else sim.again(call.func, target, chosen, *rest)


def _repeat_interleave(sim: FakeCuda, call: Call) -> Any:
    repeats = values.known(call.args[0])
    if len(call.tensors) > 1 or call.kwargs.get("output_size") is not None or repeats is None:
        return NotImplemented
    sim.events.sync("repeat_interleave")
    return sim.like(call.func(repeats, **call.kwargs))


def _bincount(sim: FakeCuda, call: Call) -> Any:
    sim.events.sync("bincount")
    return sim.like(call.func(sim.host_value(call.args[0], "bincount"), *call.args[1:]))


def _histc(sim: FakeCuda, call: Call) -> Any:
    value = values.known(call.args[0])
    if value is None:
        return NotImplemented
    return sim.like(call.func(value.float(), *call.args[1:], **call.kwargs).to(call.args[0].dtype))


HANDLERS: dict[str, Handler] = {
    "_local_scalar_dense": _item,
    "is_nonzero": _is_nonzero,
    "equal": _equal,
    "_to_copy": _to,
    "copy_": _copy,
    "nonzero": _nonzero,
    "masked_select": _masked_select,
    "index": _index,
    "index_put_": _index_put,
    "repeat_interleave": _repeat_interleave,
    "bincount": _bincount,
    "histc": _histc,
}
