"""CPU or CUDA: everything that differs between the two is decided here.

The product is one program on gloo/CPU and NCCL/CUDA.  megatron-core, though, names CUDA in its
code (``torch.cuda.current_device()``, ``device="cuda"``).  On a machine without CUDA,
:func:`setup` gives megatron-core's own modules a view of ``torch`` in which those names mean the
CPU.  Only modules under ``megatron.core`` see that view: patching ``torch`` itself would also
change what transformers sees (its rotary tables then stay uninitialised).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_phf.rendezvous import store_of_this_start

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "ones"),
    *("ones_like", "rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)
_CUDA_TENSOR_TYPES = {
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


def has_cuda() -> bool:
    """Whether this process computes on CUDA."""
    return torch.cuda.is_available()


def has_module(name: str) -> bool:
    """Whether the optional package ``name`` (transformer_engine, apex, ...) can be imported."""
    return importlib.util.find_spec(name) is not None


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in host memory; pinned where there is CUDA, so that it comes back fast."""
    if not has_cuda():
        return tensor.cpu()
    return torch.empty_like(tensor, device=_CPU, pin_memory=True).copy_(tensor)


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the device of this process, before anything queued there after this call."""
    return tensor.to(device(), non_blocking=True)


def default_dtype() -> torch.dtype:
    """bf16 on CUDA, fp32 on the CPU, where bf16 is slower and proves less."""
    return torch.bfloat16 if has_cuda() else torch.float32


def init_distributed(local_rank: int, timeout_minutes: float) -> None:
    """Join the default process group that torchrun's environment describes."""
    timeout = timedelta(minutes=timeout_minutes)
    kwargs: dict[str, Any] = {"timeout": timeout}
    if has_cuda():
        torch.cuda.set_device(local_rank)
        kwargs["device_id"] = device()
    store, rank, world_size = store_of_this_start(timeout)
    backend = "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **kwargs)


def synchronize() -> None:
    """Wait for the device, so that a wall clock read next is true."""
    if has_cuda():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated device memory on CUDA, resident set on CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_peak() -> None:
    """``peak_since_start`` counts from here."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_since_start() -> int:
    """Bytes: allocated device memory at most since ``start_peak``; on CPU the resident set now."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def record_memory_history() -> None:
    """From now on, note who allocates device memory; nothing on the CPU."""
    if has_cuda():
        torch.cuda.memory._record_memory_history()


def dump_memory_snapshot(path: str) -> None:
    """Write what is allocated on the device, as pytorch.org/memory_viz reads it.

    Raises:
        RuntimeError: there is no CUDA.
    """
    if not has_cuda():
        raise RuntimeError("no CUDA")
    torch.cuda.memory._dump_snapshot(path)


def fp8_support(recipe: str) -> str | None:
    """Why this device or Transformer Engine lacks FP8's ``recipe``; None where it is there."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    question = {
        "mxfp8": "is_mxfp8_available",
        "blockwise": "is_fp8_block_scaling_available",
    }.get(recipe, "is_fp8_available")
    available = getattr(FP8GlobalStateManager, question, None)
    if available is None:
        return "this version of Transformer Engine does not know it"
    good, reason = available()
    return None if good else str(reason)


def describe() -> str:
    """One line for the start-up summary."""
    if not has_cuda():
        return f"CPU, {torch.get_num_threads()} thread(s) a process, gloo"
    gib = torch.cuda.get_device_properties(device()).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, {gib:.0f} GiB, NCCL"


def seed_all(seed: int) -> None:
    """Seed torch on the host and on the device."""
    torch.manual_seed(seed)
    if has_cuda():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let ``tensor.type()`` say ``torch.cuda.*`` within: megatron's optimizers compare strings.

    Needed around their construction and their steps on the CPU; nothing on CUDA.
    """
    if has_cuda():
        yield
        return
    original = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = named
    try:
        yield
    finally:
        torch.Tensor.type = original


class _Stream:
    """A stream or event of a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def elapsed_time(self, other: _Stream) -> float:
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
            **{name: _tensor_type(dtype) for name, dtype in _CUDA_TENSOR_TYPES.items()},
            "current_device": lambda: _CPU,
            "device_count": lambda: 0,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
            "is_initialized": lambda: False,
            "is_current_stream_capturing": lambda: False,
            "Stream": _Stream,
            "Event": _Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda *args: _Stream(),
            "default_stream": lambda *args: _Stream(),
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    distributed = _View(dist, {"all_gather": _all_gather, "all_to_all_single": _all_to_all_single})
    return _View(torch, {"cuda": cuda, "distributed": distributed, **factories})


def _patch_rng(random_module: types.ModuleType) -> None:
    """megatron's RNG tracker and recompute read CUDA's generator through two functions."""
    random_module._get_cuda_rng_state = (  # type: ignore[attr-defined]
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    )
    random_module._set_cuda_rng_state = (  # type: ignore[attr-defined]
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    )
    # It warns when the host's generator moves while the device's is in use: here they are one.
    logging.getLogger(random_module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def setup() -> None:
    """Make megatron-core, and mbridge where imported, run on this machine's device.

    Idempotent.  Call it after the program's imports and before anything of megatron-core runs.
    """
    if has_cuda():
        return
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
