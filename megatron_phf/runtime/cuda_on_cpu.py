"""megatron-core on a machine without CUDA: the CUDA names in its code mean the CPU.

megatron-core names CUDA in its code (``torch.cuda.current_device()``, ``device="cuda"``).
:func:`install` gives its own modules a view of ``torch`` in which those names mean the CPU.  Only
modules under ``megatron.core`` and ``mbridge`` see that view: patching ``torch`` itself would also
change what transformers sees (its rotary tables then stay uninitialised).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_phf.runtime import private_names

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "ones"),
    *("ones_like", "rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)
CUDA_TENSOR_TYPES = {
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "DoubleTensor": torch.float64,
    "ByteTensor": torch.uint8,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}
_CPU = torch.device("cpu")
# Imported only when first needed; they must be there to be patched.
_LATE_MODULES = (
    "mbridge",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let ``tensor.type()`` say ``torch.cuda.*`` within, on the CPU."""
    original = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = original(self)  # a subclass may have come through here on the way
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = named
    try:
        yield
    finally:
        torch.Tensor.type = original


class Stream:
    """A stream or event of a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def record_event(self, event: Stream | None = None) -> Stream:
        return event or Stream()

    def elapsed_time(self, other: Stream) -> float:
        return (other.seconds - self.seconds) * 1e3

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None  # wait_stream, synchronize, ...: nothing to wait for


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


def _tensor_type(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda data: torch.tensor(data, dtype=dtype)


class _View(types.ModuleType):
    """A module seen through replacements; every other name is the real module's."""

    def __init__(self, real: types.ModuleType, replacements: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replacements)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _all_gather(
    tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """gloo's, also of tensors with different lengths (tokens of experts), which it refuses."""
    lengths = [len(t) if t.dim() else 1 for t in tensors]
    if len(set(lengths)) == 1:
        return dist.all_gather(tensors, tensor, group=group, async_op=async_op)
    gathered = tensor.new_empty((sum(lengths), *tensor.shape[1:]))
    copies = torch.cat([tensor] * len(tensors))
    dist.all_to_all_single(gathered, copies, lengths, [len(tensor)] * len(tensors), group=group)
    for target, part in zip(tensors, gathered.split(lengths), strict=True):
        target.copy_(part)
    return None


def _all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **kwargs: Any,
) -> Any:
    """torch's, with sizes that megatron-core turns into numbers only when they leave a GPU."""
    sizes = [
        None if s is None else list(map(int, s)) for s in (output_split_sizes, input_split_sizes)
    ]
    return dist.all_to_all_single(output, tensor, *sizes, **kwargs)


def _cpu_view() -> _View:
    nothing = {name: lambda *args, **kwargs: None for name in ("set_device", "synchronize")}
    nothing |= {n: lambda *args, **kwargs: None for n in ("empty_cache", "manual_seed_all")}
    zero = {name: lambda *args: 0 for name in ("memory_allocated", "max_memory_allocated")}
    cuda = _View(
        torch.cuda,
        {
            **nothing,
            **zero,
            **{name: _tensor_type(dtype) for name, dtype in CUDA_TENSOR_TYPES.items()},
            "current_device": lambda: _CPU,
            "device_count": lambda: 0,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
            "is_initialized": lambda: False,
            "is_current_stream_capturing": lambda: False,
            "Stream": Stream,
            "Event": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda *args: Stream(),
            "default_stream": lambda *args: Stream(),
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    distributed = _View(dist, {"all_gather": _all_gather, "all_to_all_single": _all_to_all_single})
    return _View(torch, {"cuda": cuda, "distributed": distributed, **factories})


def _patch_rng(random_module: types.ModuleType) -> None:
    """megatron's RNG tracker and recompute read CUDA's generator through two functions."""
    private_names.replace_rng_functions(
        random_module,
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
    )
    # It warns when the host's generator moves while the device's is in use: here they are one.
    logging.getLogger(random_module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def import_uncompiled() -> None:
    """Import megatron-core with the functions that it hands to torch.compile left as they are.

    They are fused kernels, which nobody runs on a CPU, and handing them over loads the compiler: a
    sixth of what a process needs to start.
    """

    def plain(function: Any = None, **options: Any) -> Any:
        return plain if function is None else function

    original = torch.compile
    torch.compile = plain
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = original


def install() -> None:
    """Let megatron-core, and mbridge where imported, see the view; idempotent."""
    for name in _LATE_MODULES:
        importlib.import_module(name)
    view = _cpu_view()
    for name, module in list(sys.modules.items()):
        if not name.startswith(("megatron.core", "mbridge")):
            continue
        if getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
        if name == "megatron.core.tensor_parallel.random":
            _patch_rng(module)
    # megatron calls these as methods, which no view of a module can reach; without CUDA they
    # could only raise.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
