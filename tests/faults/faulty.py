"""Run the product with ranks that come to harm at a given place.

    torchrun ... tests/faults/faulty.py PLAN.json FLAGS...

PLAN.json: a list of {"rank", "step", "where", "action"}; each happens once, however often torchrun
restarts: it leaves a file PLAN.json.N.  ``where``: a phase (rollout, teacher, student, optimizer),
``backward``, ``save_files`` (a checkpoint is about to be written), ``write`` (its files are there,
not yet visible), ``publish`` (it is renamed, not yet the latest).
``action``: KILL, STOP, USR1, TERM; CTRL_C: SIGINT to torchrun; FSIZE: no file may grow any
longer, as on a full disk; "BLOCK PATH": somebody puts a file into a directory PATH.
{"seconds": [low, high], "count": n, "seed": s} kills a random rank after a random time, n times.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

RANK = int(os.environ["RANK"])


class Faults:
    """The plan, and where this rank is."""

    def __init__(self, path: str) -> None:
        self._path = path
        with open(path) as f:
            self._plan = json.load(f)
        self.step, self.phase = 0, "start"

    def _first(self, number: int) -> bool:
        try:
            os.close(os.open(f"{self._path}.{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def at(self, where: str) -> None:
        """Come to harm if the plan says so."""
        for number, fault in enumerate(self._plan):
            if (fault.get("rank"), fault.get("step"), fault.get("where")) == (
                RANK,
                self.step,
                where,
            ) and self._first(number):
                _harm(fault["action"])

    def entered(self, phase: str) -> None:
        """``phase``: what the heartbeat hears, "step 3, teacher"."""
        if phase.startswith("step "):
            step, self.phase = phase.removeprefix("step ").split(", ")
            self.step = int(step)
            self.at(self.phase)

    def start_timers(self) -> None:
        """One random kill an attempt, as long as there are some left."""
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        for fault in self._plan:
            if "seconds" not in fault or attempt >= fault["count"]:
                continue
            generator = random.Random(fault["seed"] * 100_000 + attempt)
            victim = generator.randrange(int(os.environ["WORLD_SIZE"]))
            seconds = generator.uniform(*fault["seconds"])
            if victim == RANK:
                threading.Thread(target=self._kill_after, args=(seconds,), daemon=True).start()

    def _kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        with open(self._path + ".killed", "a") as f:
            f.write(json.dumps({"rank": RANK, "step": self.step, "phase": self.phase}) + "\n")
            f.flush()
            os.fsync(f.fileno())
        os.kill(os.getpid(), signal.SIGKILL)


def _harm(action: str) -> None:
    if action == "FSIZE":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    elif action == "CTRL_C":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1)  # until it has been handed on
    elif action.startswith("BLOCK "):
        path = action.removeprefix("BLOCK ")
        os.makedirs(path)
        with open(os.path.join(path, "notes.txt"), "w", encoding="utf-8") as f:
            f.write("mine")
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{action}"))


def _before(owner: object, name: str, action: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def call(*args, **kwargs):
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, call)


def main() -> None:
    """Hook the places, then run the product."""
    from megatron_phf.cli.main import main as product
    from megatron_phf.hidden import compare
    from megatron_phf.runtime import heartbeat
    from megatron_phf.train import checkpoint_files, session
    from megatron_phf.weights import torch_dist

    faults = Faults(sys.argv[1])
    heard = heartbeat.Heartbeat.at

    def at(beat: heartbeat.Heartbeat, phase: str) -> None:
        heard(beat, phase)
        faults.entered(phase)

    heartbeat.Heartbeat.at = at
    backward = compare._AttachLoss.backward

    def attached(*args):
        faults.at("backward")
        return backward(*args)

    compare._AttachLoss.backward = staticmethod(attached)
    _before(checkpoint_files, "settle", lambda *args: faults.at("write"))

    def before_write(path: str, text: str) -> None:
        if path.endswith(checkpoint_files.TRACKER):
            faults.at("publish")

    _before(checkpoint_files, "write_text", before_write)
    _before(torch_dist.Snapshot, "write", lambda *args: faults.at("save_files"))
    _before(session.Checkpoints, "resume", lambda self: faults.start_timers())
    product(sys.argv[2:])


if __name__ == "__main__":
    main()
