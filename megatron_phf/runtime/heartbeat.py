"""Which rank hangs: each tells the others, through torchrun's store, where it is."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import torch.distributed as dist

from megatron_phf.runtime import private_names

_SECONDS = 2.0


class Heartbeat:
    """A thread that notes every two seconds that this rank lives, and in which phase it is."""

    def __init__(self) -> None:
        store = private_names.default_store()
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._phase = "start"
        self._beat()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, phase: str) -> None:
        """This rank has come to ``phase``."""
        self._phase = phase
        self._beat()  # at once: who stops now must not be seen in the phase before

    @property
    def phase(self) -> str:
        """Where this rank is."""
        return self._phase

    def stop(self) -> None:
        """End the thread: Python aborts where it meets one inside the store at its own end."""
        self._stopping.set()
        self._thread.join()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone: the job ends
            self._store.set(_key(self._rank), json.dumps([time.time(), self._phase]))

    def _run(self) -> None:
        while not self._stopping.wait(_SECONDS):
            self._beat()

    def report(self) -> str:
        """A line for each other rank, the one that is silent longest first."""
        now = time.time()
        lines = []
        for rank in range(self._world):
            if rank == self._rank:
                continue
            try:
                known = self._store.check([_key(rank)])
                beat, phase = json.loads(self._store.get(_key(rank))) if known else (0.0, "start")
            except (RuntimeError, ValueError):
                return ""
            seconds = now - beat
            silent = f"silent for {seconds:.0f} s" if seconds > 3 * _SECONDS else "alive"
            lines.append((seconds, f"rank {rank}: {silent}, last in {phase}"))
        return "\n".join(text for _, text in sorted(lines, reverse=True))


def _key(rank: int) -> str:
    return f"megatron_phf/alive/{rank}"
