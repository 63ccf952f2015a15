"""Meet the other ranks of the same start.

torchrun keeps one store for all its restarts (``--max-restarts``), with the addresses of the dead
processes of earlier starts in it: process groups made from that wait for those.  So each start
agrees on a name of its own, and works below it.  torchrun's restart count is no such name: the
machines of a job count differently.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_SECONDS = 0.02


def store_of_this_start(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store that only this start's processes use, rank, world size), from torchrun's environment.

    Raises:
        RuntimeError: a rank does not come within ``timeout``.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name = _invite(store, world_size, timeout) if rank == 0 else _join(store, rank)
    return dist.PrefixStore(name, store), rank, world_size


def _join(store: dist.Store, rank: int) -> str:
    """Ask rank 0 under a key that nobody had before: an answer cannot be an old one."""
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    name = store.get(f"answer/{me}").decode()  # waits
    store.set(f"joined/{name}/{rank}", "")
    return name


def _invite(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    """Answer every rank that asks until all have joined; a dead process's question does no harm."""
    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
    missing = set(range(1, world_size))
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if not store.check([f"hello/{rank}"]):
                continue
            asked = store.get(f"hello/{rank}")
            if answered.get(rank) != asked:
                store.set(f"answer/{asked.decode()}", name)
                answered[rank] = asked
            if store.check([f"joined/{name}/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"rank(s) {sorted(missing)} did not come within {timeout}")
        time.sleep(_POLL_SECONDS)
    return name
