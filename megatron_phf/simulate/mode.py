"""Runs every operation of a rank: CUDA tensors without memory, host tensors for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_phf.simulate import values
from megatron_phf.simulate.events import Events
from megatron_phf.simulate.memory import DeviceMemory
from megatron_phf.simulate.torch_names import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    operator_name,
)

CUDA = torch.device("cuda", 0)
# CUDA takes indices from the host: copies them, and waits.
_TAKES_HOST_INDICES = {"index", "index_put_", "_unsafe_index", "_index_put_impl_"}


@dataclass
class Call:
    """One operation on the way: its operator, its arguments, the tensors among these."""

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    tensors: list[Tensor]

    @property
    def name(self) -> str:
        """The operator's, without its overload."""
        return operator_name(self.func)

    def on_device(self) -> bool:
        """Whether it reads, writes or makes a device tensor."""
        if any(isinstance(t, FakeTensor) for t in self.tensors):
            return True
        wanted = self.kwargs.get("device")
        return wanted is not None and torch.device(wanted).type == "cuda"


# Takes the call itself, or NotImplemented: then it runs like any other.
Handler = Callable[["FakeCuda", Call], Any]


class FakeCuda(TorchDispatchMode):
    """Within, tensors of the device cuda:0 have shapes and no memory.

    Attributes:
        events, memory: what is reported.
        made_up: the number that stands where the host asks for a value that nobody knows.
        handlers: operations that are not like any other, by operator's name.
        communicate: takes the operations of process groups.
    """

    def __init__(self, handlers: dict[str, Handler], communicate: Handler) -> None:
        super().__init__()
        self.events = Events()
        self.memory = DeviceMemory(self.events)
        self.made_up: Callable[[], int] = lambda: 1
        self._handlers, self._communicate = handlers, communicate
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's hook: every operation comes here."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        tensors = [x for x in values.leaves((args, kwargs)) if isinstance(x, Tensor)]
        call = Call(func, args, kwargs, tensors)
        if func.namespace == "c10d":
            return self._communicate(self, call)
        if not call.on_device():
            kwargs.pop("pin_memory", None)  # which takes CUDA's own allocator
            return args[0] if call.name == "_pin_memory" else func(*args, **kwargs)
        self.events.count += 1
        handler = self._handlers.get(call.name)
        if handler is not None:
            out = handler(self, call)
            if out is not NotImplemented:
                return out
        return self.run(call)

    def run(self, call: Call) -> Any:
        """The operation as torch itself checks it; its results are counted, and may be known."""
        self._check_devices(call)
        with self._fake:
            out = call.func(*call.args, **call.kwargs)
        for t in values.leaves(out):
            if isinstance(t, FakeTensor) and t.fake_device.type == "cuda":
                self.memory.track(t)
        values.propagate(call.func, call.args, call.kwargs, out)
        return out

    def again(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Another operation in place of the one that is handled."""
        return self.__torch_dispatch__(func, (), args, kwargs)

    def like(self, value: Tensor) -> Any:
        """A device tensor with this value."""
        with self._fake:
            shape = (value.size(), value.stride())
            t = torch.empty_strided(*shape, dtype=value.dtype, device=CUDA)
        self.memory.track(t)
        return values.give(t, value)

    def empty(self, *shape: int, dtype: torch.dtype) -> Any:
        """A device tensor with an unknown value."""
        with self._fake:
            t = torch.empty(*shape, dtype=dtype, device=CUDA)
        self.memory.track(t)
        return t

    def host_value(self, tensor: Any, kind: str) -> Tensor:
        """A copy of the value on the host, made up where it is unknown."""
        value = values.known(tensor)
        if value is not None:
            return value.detach().clone()
        self.events.make_up(kind)
        return torch.full(tensor.shape, self.made_up(), dtype=tensor.dtype)

    def _check_devices(self, call: Call) -> None:
        """torch's own check lets some operators take host tensors that CUDA would refuse."""
        if call.name in ("copy_", "_to_copy") or not any(is_on_device(t) for t in call.tensors):
            return
        if any(t.dim() > 0 and not is_on_device(t) for t in call.tensors):
            if call.name in _TAKES_HOST_INDICES:
                self.events.sync("indices from the host")
            else:
                self.events.refuse(f"{call.name} of tensors on the device and on the host")


def is_on_device(tensor: Any) -> bool:
    """Whether a tensor is the device's."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"
