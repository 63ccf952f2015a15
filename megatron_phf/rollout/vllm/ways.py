"""How tensors travel to a server's workers: vLLM's weight-transfer backends, the trainer's end.

Each way has ``message`` (every rank: what ``/update_weights`` says of some tensors), ``connect``
(rank 0: a link to one server's workers) and ``send`` (rank 0: the tensors, while ``tell`` asks the
server for its part and waits for the answer: over NCCL each side waits in its call for the other).
A message is received whole before its tensors are looked at.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_phf.rollout.vllm import wire
from megatron_phf.rollout.vllm.control import Control, ServerGone
from megatron_phf.runtime import device, parallel, private_names

Named = Sequence[tuple[str, Tensor]]
MESSAGE_BYTES = 2**28


def described(tensors: Named) -> dict[str, Any]:
    """Names, dtypes and shapes, as vLLM has them."""
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def address_towards(host: str) -> str:
    """This machine's address, as ``host`` reaches it."""
    family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family[0], socket.SOCK_DGRAM) as s:
        s.connect(family[4])  # sends nothing
        return str(s.getsockname()[0])


def _meanwhile(
    act: Callable[[], Any], tell: Callable[[], None], seconds: float, abort: Callable[[], None]
) -> Any:
    """What ``act`` gives, which blocks until the server does its part: what ``tell`` asks for.

    Where it refuses, or dies, ``abort`` ends what it would leave waiting: here, and on the device.
    """
    results: list[Any] = []

    def acted() -> None:
        with contextlib.suppress(RuntimeError):  # the others did not come
            results.append(act())

    thread = threading.Thread(target=device.in_thread(acted), daemon=True)
    thread.start()
    try:
        tell()
        thread.join(seconds)
        if not results:
            raise ServerGone("its workers did not meet the trainer")
    except Exception:
        abort()
        raise
    return results[0]


class _FromRank0:
    """Rank 0 alone sends, over a group that it and the workers join."""

    on_every_rank = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def message(self, tensors: Named) -> dict[str, Any]:
        """See the module."""
        return described(tensors)

    def send(self, group: Any, tensors: Named, tell: Callable[[], None]) -> None:
        """See the module."""

        def broadcast() -> bool:
            sent = self._sent(tensors)  # kept until they are read
            for work in [group.broadcast(tensor, wire.TRAINER) for tensor in sent]:
                work.wait()
            return True

        _meanwhile(broadcast, tell, self._seconds, group.abort)

    def _sent(self, tensors: Named) -> list[Tensor]:
        return [tensor.contiguous() for _, tensor in tensors]


class TorchDistributed(_FromRank0):
    """The receiver that this package brings vLLM (``plugin``): gloo on CPUs, NCCL between GPUs."""

    def connect(self, control: Control, workers: int) -> Any:
        """See the module."""
        size, cuda = workers + 1, device.has_cuda()
        store = wire.offer(size, self._seconds)
        info = {
            "master_address": address_towards(control.server.host),
            "master_port": store.port,
            "world_size": size,
            "timeout_seconds": self._seconds,
        }
        return _meanwhile(
            lambda: wire.join(store, wire.TRAINER, size, self._seconds, cuda),
            lambda: control.init(info),
            self._seconds,
            lambda: None,  # its own time ends it
        )


class Nccl(_FromRank0):
    """vLLM's ``nccl``: a communicator of this GPU and the workers', one broadcast a message."""

    def connect(self, control: Control, workers: int) -> Any:
        """See the module; the workers' warm-up is an all-reduce of one element."""
        size, store = workers + 1, dist.HashStore()
        store.set_timeout(timedelta(seconds=self._seconds))
        group = wire.join(store, wire.TRAINER, size, self._seconds, cuda=True)

        def join() -> Any:
            group.allreduce(torch.ones(1, device=device.device())).wait()
            return group

        def tell() -> None:
            # torch keeps the identity of a group's first communicator so for the other ranks.
            identity = base64.b64encode(store.get("0")).decode()
            info = {"nccl_unique_id_b64": identity, "rank_offset": 1, "world_size": size}
            packing = {"packed_buffer_size_bytes": MESSAGE_BYTES, "packed_num_buffers": 1}
            control.init({**info, "packed": True, **packing})

        return _meanwhile(join, tell, self._seconds, group.abort)

    def _sent(self, tensors: Named) -> list[Tensor]:
        return [_packed(tensors)]


class Ipc:
    """vLLM's ``ipc``: each worker reads a buffer of the trainer's rank on its own GPU.

    The handles are pickled, which the server takes with VLLM_ALLOW_INSECURE_SERIALIZATION=1.
    """

    on_every_rank = True

    def __init__(self, seconds: float) -> None:
        self._buffer: Tensor | None = None
        self._handle: dict[str, Any] = {}

    def message(self, tensors: Named) -> dict[str, Any]:
        """See the module; every rank has the tensors in a buffer that its GPU's worker may map."""
        from torch.multiprocessing.reductions import reduce_tensor

        packed = _packed(tensors)
        if self._buffer is None or len(self._buffer) < len(packed):
            self._buffer = _shareable(max(len(packed), MESSAGE_BYTES))
            gpu = str(torch.cuda.get_device_properties(device.device()).uuid)
            self._handle = {gpu: reduce_tensor(self._buffer)[1]}
        self._buffer[: len(packed)] = packed
        device.synchronize()
        handles: dict[str, Any] = {}
        for each in parallel.gather_objects(self._handle):
            handles |= each
        sizes = [tensor.nbytes for _, tensor in tensors]
        pickled = base64.b64encode(pickle.dumps(handles)).decode()
        return {**described(tensors), "tensor_sizes": sizes, "ipc_handles_pickled": pickled}

    def connect(self, control: Control, workers: int) -> Any:
        """See the module."""
        control.init({"packed": True})

    def send(self, link: Any, tensors: Named, tell: Callable[[], None]) -> None:
        """See the module; they are where the worker reads them."""
        tell()


def _shareable(size: int) -> Tensor:
    """Bytes on this GPU, which another process may map.

    In no expandable segment: to map those takes ``pidfd_getfd``, which containers refuse.
    """
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "")
    private_names.set_allocator(settings.replace("segments:True", "segments:False"))
    try:
        return torch.empty(size, dtype=torch.uint8, device=device.device())
    finally:
        private_names.set_allocator(settings)


def _packed(tensors: Named) -> Tensor:
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in tensors])


WAYS: dict[str, Callable[[float], Any]] = {
    wire.BACKEND: TorchDistributed,
    "nccl": Nccl,
    "ipc": Ipc,
}
