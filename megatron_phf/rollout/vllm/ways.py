"""How tensors travel to a server's workers: vLLM's weight-transfer backends, the trainer's end.

Each way has ``message`` (every rank: what ``/update_weights`` says of some tensors), ``connect``
(rank 0: a link to one server's workers) and ``send`` (rank 0: start the tensors on their way, then
the server is told).  A message is received whole before its tensors are looked at, so that a
server that refuses one leaves nobody waiting.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_phf.rollout.vllm import wire
from megatron_phf.rollout.vllm.control import Control, ServerGone
from megatron_phf.runtime import device, parallel

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


def _meanwhile(join: Callable[[], Any], tell: Callable[[], None], seconds: float) -> Any:
    """What ``join`` gives, which returns once what ``tell`` asks for is done.

    Where the server refuses, nobody waits for the join: its own time ends it.
    """
    found: list[Any] = []

    def joined() -> None:
        with contextlib.suppress(RuntimeError):  # the others did not come
            found.append(join())

    thread = threading.Thread(target=device.in_thread(joined), daemon=True)
    thread.start()
    tell()
    thread.join(seconds)
    if not found:
        raise ServerGone("its workers did not meet the trainer")
    return found[0]


class _FromRank0:
    """Rank 0 alone sends, over a group that it and the workers join."""

    on_every_rank = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def message(self, tensors: Named) -> dict[str, Any]:
        """See the module."""
        return described(tensors)


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
        )

    def send(self, group: Any, tensors: Named) -> Callable[[], None]:
        """See the module; call what it gives to wait until all is sent."""
        sent = [tensor.contiguous() for _, tensor in tensors]  # kept until they are read
        works = [group.broadcast(tensor, wire.TRAINER) for tensor in sent]

        def wait() -> None:
            for work, _ in zip(works, sent, strict=True):
                work.wait()

        return wait


class Nccl(_FromRank0):
    """vLLM's ``nccl``: a communicator of this GPU and the workers' GPUs.

    One packed broadcast a message, on a stream of its own: where the server dies in the midst, what
    hangs is that stream.
    """

    def connect(self, control: Control, workers: int) -> Any:
        """See the module; the workers' warm-up is an all-reduce of one element."""
        identity = torch.cuda.nccl.unique_id()
        info = {
            "nccl_unique_id_b64": base64.b64encode(identity).decode(),
            "rank_offset": 1,
            "world_size": workers + 1,
            "packed": True,
            "packed_buffer_size_bytes": MESSAGE_BYTES,
            "packed_num_buffers": 1,
        }

        def join() -> Any:
            communicator = torch.cuda.nccl.init_rank(workers + 1, identity, 0)
            ones = torch.ones(1, device=device.device())
            torch.cuda.nccl.all_reduce([ones], comms=[communicator])
            return communicator, torch.cuda.Stream()

        return _meanwhile(join, lambda: control.init(info), self._seconds)

    def send(self, link: Any, tensors: Named) -> Callable[[], None]:
        """See the module."""
        communicator, stream = link
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            packed = _packed(tensors)
            torch.cuda.nccl.broadcast([packed], comms=[communicator])

        return stream.synchronize


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
            self._buffer = packed.new_empty(max(len(packed), MESSAGE_BYTES))
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

    def send(self, link: Any, tensors: Named) -> Callable[[], None]:
        """Nothing: they are where the worker reads them."""
        return lambda: None


def _packed(tensors: Named) -> Tensor:
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in tensors])


WAYS: dict[str, Callable[[float], Any]] = {
    wire.BACKEND: TorchDistributed,
    "nccl": Nccl,
    "ipc": Ipc,
}
