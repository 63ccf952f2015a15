"""Every private name of torch and megatron-core that the simulation uses, and nowhere else.

The sibling of ``runtime/private_names.py``, which looks for its names at every start of a job;
these are looked for by the dry run alone.  Undocumented names without an underscore are in the
table too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.optim import optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore as FakeStore
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_map as tree_map

from megatron_phf.runtime import private_names
from megatron_phf.runtime.private_names import Package
from megatron_phf.simulate.shim import SEEN

TORCH = Package(
    "torch",
    ", ".join(SEEN),
    (
        "torch:_C._set_only_lift_cpu_tensors",
        "torch:_C.TensorBase.data",
        "torch:_C._distributed_c10d.ProcessGroup.unbox",
        "torch:_C._distributed_c10d.FakeWork",
        "torch._subclasses.fake_tensor:init_gpu_context",
        "torch._subclasses.fake_tensor:FakeTensorMode.avoid_device_init",
        "torch.nn:Module._apply",
        "torch:ops.aten._scaled_dot_product_flash_attention",
        "torch:ops.aten._scaled_dot_product_efficient_attention",
        "torch:ops.aten.add.Tensor._schema",
        "torch:_foreach_add_",
        "torch:_foreach_mul_",
        "torch:_foreach_div_",
        "torch:_foreach_lerp_",
        "torch:_foreach_addcmul_",
        "torch:_foreach_addcdiv_",
        "torch.optim.optimizer:_foreach_supported_types",
    ),
)
MEGATRON = Package(
    "megatron-core",
    "0.16.1",
    ("megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes",),
)
_IN_PLACE = (
    *("_foreach_add_", "_foreach_mul_", "_foreach_div_"),
    *("_foreach_lerp_", "_foreach_addcmul_", "_foreach_addcdiv_"),
)
# What a fake tensor keeps in its dictionary beside the marks that megatron-core puts on weights.
_INNER = {"fake_device", "fake_mode", "constant", "pytype", "dispatch_keys", "real_tensor"}


def check() -> None:
    """Raise ValueError where a name is missing (see ``private_names.check``)."""
    private_names.check([TORCH, MEGATRON])


@functools.cache
def operator_name(func: Any) -> str:
    """``add`` of ``aten::add.Tensor``."""
    return func._schema.name.split("::")[1]


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write)


@functools.cache
def argument_names(func: Any) -> tuple[str, ...]:
    """Those of an operator's schema."""
    return tuple(a.name for a in func._schema.arguments)


@functools.cache
def number_of_results(func: Any) -> int:
    """How many values an operator returns."""
    return len(func._schema.returns)


def is_view(tensor: Tensor) -> bool:
    """Whether it is a part of another tensor."""
    return tensor._base is not None


def storage_key(storage: Any) -> int:
    """The address of a storage's record: unique as long as it lives."""
    return storage._cdata


def process_group(argument: Any) -> Any:
    """The process group in a boxed argument of a c10d operator; None where it is another thing."""
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return torch._C._distributed_c10d.ProcessGroup.unbox(argument)
    except RuntimeError:
        return None


def finished_work() -> Any:
    """What a c10d operator returns of communication that is over, boxed."""
    return torch._C._distributed_c10d.FakeWork().boxed()


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """The operator that ``scaled_dot_product_attention`` takes on an H100."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, 0.0, causal, scale=scale)[0]


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """The operator that it takes there with a mask, made into a bias of the query's dtype."""
    bias = torch.empty_like(mask, dtype=query.dtype) if mask.dtype is torch.bool else mask
    shape = (*query.shape[:3], key.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, bias.expand(shape), True, 0.0, False, scale=scale)[0]


def let_fakes_be_cuda(move: Callable[[Any, Any, Any], None]) -> None:
    """CUDA tensors are made from host values, and no context of a device is looked for.

    ``move(parameter, tensor, set_data)`` does ``parameter.data = tensor``, which must also move a
    fake tensor between devices.
    """
    torch._C._set_only_lift_cpu_tensors(True)
    fake_tensor.init_gpu_context = lambda *args: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    base = torch._C.TensorBase.data
    FakeTensor.data = property(
        lambda self: base.__get__(self), lambda self, new: move(self, new, base.__set__)
    )


def run_in_place() -> None:
    """torch's optimizers take their operations on lists, which change each tensor in place.

    They leave fake tensors to loops of their own; and without CUDA's kernels such an operation is
    taken apart into one that makes a tensor and a copy.
    """
    optimizer._foreach_supported_types.append(FakeTensor)
    for name in _IN_PLACE:
        setattr(torch, name, _on_each(name.removeprefix("_foreach_"), getattr(torch, name)))


def _on_each(name: str, foreach: Callable[..., None]) -> Callable[..., None]:
    one, fused = getattr(Tensor, name), name.startswith("addc")

    def run(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(t, FakeTensor) for t in tensors):
            return foreach(tensors, *args, **kwargs)
        for i, t in enumerate(tensors):
            own = [a[i] if isinstance(a, list | tuple) else a for a in args]
            more = {"value": own.pop()} if fused and len(own) > 2 else {}
            one(t, *own, **more, **kwargs)
        return None

    return run


def replace_module_apply(apply: Callable[..., Any]) -> None:
    """What ``Module.to`` and its like go through."""
    torch.nn.Module._apply = apply


def apply_to(module: Any, function: Callable[..., Any]) -> None:
    """Let a module convert its parameters and buffers, as ``Module.to`` does."""
    module._apply(function)


def marks(parameter: Tensor) -> dict[str, Any]:
    """The attributes that were put on a parameter."""
    return {k: v for k, v in vars(parameter).items() if k not in _INNER and not k.startswith("_")}


def replace_shape_exchange(announced: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """How neighbouring stages tell each other the shapes of what they send."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    P2PCommunicator._communicate_shapes = announced(P2PCommunicator._communicate_shapes)
