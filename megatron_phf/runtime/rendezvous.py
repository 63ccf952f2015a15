"""Meet the other ranks of the same start.

torchrun keeps one store for all its restarts (``--max-restarts``), with the addresses of the dead
processes of earlier starts in it: process groups made from that wait for those.  So each start
agrees on a name of its own, and works below it.  torchrun's restart count is no such name: the
machines of a job count differently.

A start that waits says for whom, one rank a machine, before half a minute is over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

_POLL_SECONDS = 0.02
_SILENT_SECONDS = 20.0


@contextlib.contextmanager
def said(whom: Callable[[], str]) -> Iterator[None]:
    """Name ``whom`` this rank waits for where what is done within takes long."""
    me = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"

    def say() -> None:
        print(f"{me} waits for {whom()}", file=sys.stderr, flush=True)

    timer = threading.Timer(_SILENT_SECONDS, say)
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def reach_own_machine() -> None:
    """Let gloo use the loopback interface where a lone machine's name is none of its addresses.

    Gloo itself would take 127.0.0.1, which a machine without IPv4 has not.
    """
    world_size = os.environ.get("WORLD_SIZE")
    if os.environ.get("LOCAL_WORLD_SIZE", world_size) != world_size:
        return
    with contextlib.suppress(OSError):
        for family, *_, address in socket.getaddrinfo(socket.gethostname(), 0):
            with contextlib.suppress(OSError), socket.socket(family) as s:
                s.bind(address)
                return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def store_of_this_start(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store that only this start's processes use, rank, world size), from torchrun's environment.

    Raises:
        RuntimeError: a rank does not come within ``timeout``.
    """
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    with said(lambda: f"others to meet at {place}: do all resolve and reach it?"):
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    missing = set(range(1, world_size))
    with said(lambda: f"rank(s) {sorted(missing) if rank == 0 else [0]} to start"):
        name = _invite(store, missing, timeout) if rank == 0 else _join(store, rank)
    return dist.PrefixStore(name, store), rank, world_size


def _join(store: dist.Store, rank: int) -> str:
    """Ask rank 0 under a key that nobody had before: an answer cannot be an old one."""
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    name = store.get(f"answer/{me}").decode()  # waits
    store.set(f"joined/{name}/{rank}", "")
    return name


def _invite(store: dist.Store, missing: set[int], timeout: timedelta) -> str:
    """Answer each rank that asks until none is missing; a dead process's question does no harm."""
    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
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
