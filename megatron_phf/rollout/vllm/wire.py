"""Tensors from the trainer to a server's workers over torch.distributed: both ends, torch alone.

The group is apart from the default one of either program: rank 0 is the trainer, the workers follow
it in the order of their ranks.  It ends with the connection of any member, over NCCL by ``abort``:
there the first call of a kind waits in the host for the others, and a dead member keeps it waiting.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "torch_distributed"  # of vLLM's --weight-transfer-config
TRAINER = 0
_JOINING = threading.Lock()


def offer(size: int, seconds: float) -> dist.TCPStore:
    """Where the members of a new group of ``size`` meet, on this machine; its port is free."""
    wait = timedelta(seconds=seconds)
    return dist.TCPStore("0.0.0.0", 0, size, True, wait, wait_for_workers=False)


def meet(host: str, port: int, seconds: float) -> dist.TCPStore:
    """The place that another has offered.

    Raises:
        RuntimeError: nobody answers there.
    """
    return dist.TCPStore(host, port, None, False, timedelta(seconds=seconds))


def join(store: dist.Store, rank: int, size: int, seconds: float, cuda: bool) -> Any:
    """The group, once all of its members have joined; NCCL between GPUs, else gloo.

    Raises:
        RuntimeError: some did not, in time.
    """
    if not cuda:
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=seconds))
    # Else torch's watchdog ends this process where a member dies or the group is aborted.  Groups
    # read the variable as they are made, and have no other setting for it.
    name = "TORCH_NCCL_BLOCKING_WAIT"
    with _JOINING:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            return dist.ProcessGroupNCCL(store, rank, size, timedelta(seconds=seconds))
        finally:
            del os.environ[name]
            os.environ.update({} if before is None else {name: before})


def receive(
    group: Any, dtype_names: list[str], shapes: list[list[int]], device: torch.device
) -> list[Tensor]:
    """All tensors of one message, before any of them is looked at: the trainer waits for nobody.

    Raises:
        RuntimeError: the trainer is gone.
    """
    dtypes = [getattr(torch, name) for name in dtype_names]
    pairs = zip(shapes, dtypes, strict=True)
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in pairs]
    for tensor in tensors:
        group.broadcast(tensor, TRAINER).wait()
    return tensors
