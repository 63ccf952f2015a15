"""CPU or CUDA: everything that differs between the two is decided here.

The product is one program on gloo/CPU and NCCL/CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import resource
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_phf.runtime import cuda_on_cpu, grad_norm, optional_packages, private_names
from megatron_phf.runtime.rendezvous import reach_own_machine, said, store_of_this_start
from megatron_phf.runtime.visible_gpus import check_gpus_are_used

_CPU = torch.device("cpu")


def has_cuda() -> bool:
    """Whether this process computes on CUDA."""
    return torch.cuda.is_available()


def has_module(name: str) -> bool:
    """Whether the optional package ``name`` (transformer_engine, apex, ...) imports."""
    return optional_packages.why_missing(name) is None


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


def from_host(tensor: torch.Tensor) -> torch.Tensor:
    """What was made in host memory, on the device of this process; nobody waits for the copy."""
    return to_device(host_buffer(tensor).copy_(tensor)) if has_cuda() else tensor


def host_buffer(like: torch.Tensor) -> torch.Tensor:
    """Host memory for a copy of ``like``; pinned where there is CUDA, which costs time to make."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=has_cuda())


def when_done() -> Callable[[], object]:
    """A function that waits until what is queued on the device now is done; any thread's."""
    if not has_cuda():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


class LateReader:
    """Reads a small tensor that every step of the device writes anew, without stopping the device.

    On CUDA a read gives what the one before has found: the host waits for a copy while a newer step
    is queued behind it, so that the device always has work.  On the CPU it gives the tensor itself.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, Callable[[], object]] | None = None

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """``tensor`` as it was at the call before, on the host; None at the first one on CUDA."""
        if not has_cuda():
            return tensor
        before = self._pending
        copy = host_buffer(tensor).copy_(tensor, non_blocking=True)
        self._pending = (copy, when_done())
        if before is None:
            return None
        before[1]()
        return before[0]


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """Launches again all that ``function`` launches on the device, as one CUDA graph; runs nothing.

    Raises:
        RuntimeError: it does what a graph cannot hold, a wait for the device say.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: NCCL's watchdog, loaders.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def in_thread(function: Callable[..., object]) -> Callable[..., None]:
    """``function`` for a new thread, where torch would take GPU 0: this thread's device instead."""
    index = device().index

    def run(*args: Any) -> None:
        if index is not None:
            torch.cuda.set_device(index)
        function(*args)

    return run


def default_dtype() -> torch.dtype:
    """bf16 on CUDA, fp32 on the CPU, where bf16 is slower and proves less."""
    return torch.bfloat16 if has_cuda() else torch.float32


def init_distributed(local_rank: int, timeout_minutes: float) -> None:
    """Join the default process group that torchrun's environment describes.

    Raises:
        ValueError: this machine has fewer GPUs than ranks, or GPUs that torch cannot use.
    """
    check_gpus_are_used()
    timeout = timedelta(minutes=timeout_minutes)
    kwargs: dict[str, Any] = {"timeout": timeout}
    if has_cuda():
        _check_number_of_gpus()
        torch.cuda.set_device(local_rank)
        kwargs["device_id"] = device()
    store, rank, world_size = store_of_this_start(timeout)
    backend = "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
    reach_own_machine()
    with said(lambda: "connections to the others (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **kwargs)


def _check_number_of_gpus() -> None:
    wanted, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if wanted > count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
        raise ValueError(
            f"torchrun --nproc-per-node {wanted}: this machine has {count} GPU(s) for it{shown}; "
            f"start {count} process(es)"
        )


def row_multiple() -> int:
    """What rows of tokens are padded to a multiple of, that need not have a length of their own.

    cuDNN's attention, which Transformer Engine takes on Hopper, builds and keeps a plan for each
    (batch, length): tens of milliseconds that a step of a new length pays in every layer's shape.
    """
    return 64 if has_cuda() else 1


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
        private_names.record_memory_history()


def dump_memory_snapshot(path: str) -> None:
    """Write what is allocated on the device, as pytorch.org/memory_viz reads it.

    Raises:
        RuntimeError: there is no CUDA.
    """
    if not has_cuda():
        raise RuntimeError("no CUDA")
    private_names.dump_memory_snapshot(path)


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


def cuda_type_names() -> contextlib.AbstractContextManager[None]:
    """Let ``tensor.type()`` say ``torch.cuda.*`` within: megatron's optimizers compare strings.

    Needed around their construction and their steps on the CPU; nothing on CUDA.
    """
    return contextlib.nullcontext() if has_cuda() else cuda_on_cpu.cuda_type_names()


def import_megatron() -> None:
    """Import megatron-core; before any other import of it, as that would find broken packages.

    On a CPU it then also takes less time.

    Raises:
        ValueError: triton is missing, which newer ones import and a CPU's torch does not bring.
    """
    optional_packages.hide_broken()
    try:
        if has_cuda():
            importlib.import_module("megatron.core")
        else:
            cuda_on_cpu.import_uncompiled()
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        version = importlib.metadata.version("megatron-core")
        raise ValueError(
            f"megatron-core {version} imports triton, which is not installed: pip install triton"
        ) from error


def setup() -> None:
    """Make megatron-core, mbridge where imported, and torch's attention run well on this device.

    Idempotent.  Call it after the program's imports and before anything of megatron-core runs.

    Raises:
        ValueError: an installed version lacks a private name that is used (private_names).
    """
    private_names.check()
    if has_cuda():
        # torch prefers it on Hopper, with a plan for each exact size: a new one (about 30 ms) for
        # every token that is decoded, and for every length of a batch.  What is left: flash and
        # memory-efficient attention, and torch's own arithmetic (megatron_phf.model.attention).
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        cuda_on_cpu.install()
    grad_norm.install()
