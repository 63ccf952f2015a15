"""``torch.cuda`` and the few functions of torch that would look for a device."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch
from torch import Tensor

from megatron_phf.runtime.cuda_on_cpu import CUDA_TENSOR_TYPES, Stream
from megatron_phf.simulate import torch_names, values
from megatron_phf.simulate.mode import CUDA, FakeCuda
from megatron_phf.simulate.torch_names import FakeTensor

_NOTHING = (
    "_lazy_init", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state",
    "reset_peak_memory_stats", "init", "ipc_collect",
)  # fmt: skip
_DEVICES = 8


def install(sim: FakeCuda) -> None:
    """From now on this process has CUDA devices, for everything that asks torch."""
    _install_cuda(sim)
    torch.autograd.set_multithreading_enabled(False)  # a device's thread would not be simulated
    torch_names.let_fakes_be_cuda(_set_data)
    torch_names.replace_module_apply(_apply)
    torch_names.run_in_place()
    _install_values(sim)
    _install_fused(sim)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what only a device has."""


def _install_cuda(sim: FakeCuda) -> None:
    cuda: Any = torch.cuda
    state = torch.zeros(16, dtype=torch.uint8)
    properties = types.SimpleNamespace(
        total_memory=80 * 10**9, major=9, minor=0, multi_processor_count=132, name="simulated H100"
    )

    class Waiting(Stream):
        """A stream or event that the host may wait for."""

        def synchronize(self) -> None:
            sim.events.sync("wait for a stream or an event")

        def record_event(self, event: Stream | None = None) -> Stream:
            return event or Waiting()

    replaced: dict[str, Any] = dict.fromkeys(_NOTHING, _nothing)
    replaced |= {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: _DEVICES,
        "current_device": lambda: 0,
        "get_rng_state": lambda *args, **kwargs: state.clone(),
        "memory_allocated": lambda *args: sim.memory.bytes,
        "memory_reserved": lambda *args: sim.memory.bytes,
        "max_memory_allocated": lambda *args: sim.memory.peak,
        "get_device_name": lambda *args: properties.name,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: properties,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *args: sim.events.sync("torch.cuda.synchronize"),
        "Stream": Waiting,
        "Event": Waiting,
        "current_stream": lambda *args: Waiting(),
        "default_stream": lambda *args: Waiting(),
        "stream": lambda stream: contextlib.nullcontext(),
        "default_generators": (_Generator(),) * _DEVICES,
    }
    replaced |= {name: _maker(dtype) for name, dtype in CUDA_TENSOR_TYPES.items()}
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state = replaced["get_rng_state"]
    cuda.random.set_rng_state = _nothing


def _maker(dtype: torch.dtype) -> Any:
    return lambda data: torch.tensor(data, dtype=dtype, device=CUDA)


class _Generator:
    """The device's generator of random numbers, which nobody draws from."""

    def __getattr__(self, name: str) -> Any:
        if name == "initial_seed":
            return lambda: 0
        return lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)


def _set_data(parameter: Any, tensor: Any, set_data: Any) -> None:
    """``parameter.data = tensor``, which may lie on the other device."""
    set_data(parameter, tensor)
    if isinstance(parameter, FakeTensor) and isinstance(tensor, FakeTensor):
        parameter.fake_device = tensor.fake_device


def _apply(self: Any, function: Any, recurse: bool = True) -> Any:
    """torch's, which would swap a host parameter's inside for a fake one's: a new parameter."""
    for child in self.children():
        torch_names.apply_to(child, function)
    for name, old in self._parameters.items():
        if old is None:
            continue
        with torch.no_grad():
            new = function(old)
        fake = isinstance(old, FakeTensor)
        if new is old or (fake and (new.device, new.dtype) == (old.device, old.dtype)):
            continue
        self._parameters[name] = torch.nn.Parameter(new, old.requires_grad)
        vars(self._parameters[name]).update(torch_names.marks(old))
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _install_values(sim: FakeCuda) -> None:
    """Python's view of device tensors: lists of them, tensors of lists of them."""
    make, finite = torch.tensor, torch.isfinite
    module: Any = torch

    def tolist(self: Any) -> Any:
        if self.fake_device.type == "cuda":
            sim.events.sync("tolist")
        return sim.host_value(self, "tolist").tolist()

    def plain(x: Any) -> Any:
        if isinstance(x, FakeTensor):
            return x.tolist() if x.dim() else x.item()
        return [plain(y) for y in x] if isinstance(x, list | tuple) else x

    def tensor(data: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("pin_memory", None)
        return make(plain(data) if isinstance(data, list | tuple) else data, **kwargs)

    def isfinite(x: Any) -> Any:
        """Its operator is taken apart into comparisons, which would know nothing."""
        out = finite(x)
        if isinstance(out, FakeTensor) and values.known(out) is None and values.small([out]):
            values.give(out, torch.ones(out.shape, dtype=torch.bool))
        return out

    FakeTensor.tolist = tolist
    FakeTensor.record_stream = _nothing
    module.tensor = tensor
    module.isfinite = torch.Tensor.isfinite = isfinite


class _RMSNorm(torch.autograd.Function):
    """What CUDA's kernel allocates and keeps: a CPU build would take the norm apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _install_fused(sim: FakeCuda) -> None:
    functional: Any = torch.nn.functional
    module: Any = torch
    attend, norm = functional.scaled_dot_product_attention, torch.rms_norm

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """What an H100 takes; torch would choose by what a CPU build has."""
        if isinstance(query, FakeTensor) and attn_mask is None:
            return torch_names.flash_attention(query, key, value, is_causal, scale)
        if isinstance(query, FakeTensor) and not enable_gqa:
            return torch_names.efficient_attention(query, key, value, attn_mask, scale)
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                      enable_gqa=enable_gqa)  # fmt: skip

    def rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        if not isinstance(x, FakeTensor):
            return norm(x, shape, weight, eps)
        if x.device != weight.device or x.dtype != weight.dtype:
            raise RuntimeError(
                f"rms_norm of {x.dtype} on {x.device} by a weight of {weight.dtype} on "
                f"{weight.device}"
            )
        return _RMSNorm.apply(x, weight)

    functional.scaled_dot_product_attention = attention
    module.rms_norm = rms_norm
