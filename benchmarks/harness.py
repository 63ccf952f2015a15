"""Timing and memory of variants of one computation, against each other in one run.

A single time says little on a shared machine.  Variants take turns, every round times each of
them once, and a figure is the ratio within a round: what slows the machine for a while slows both.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_phf.runtime.environment import torchrun

REPO = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def as_json(self) -> dict[str, float]:
        """Four digits are more than the machine's noise leaves."""
        return {name: float(f"{value:.4g}") for name, value in vars(self).items()}


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one call of each that does not count.

    ``warm``: there was one already.
    """
    for function in () if warm else variants.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        # Every other round backwards: nobody always runs behind the same neighbour.
        names = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in names:
            times[name].append(seconds_of(variants[name]))
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of two variants' times, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * PAGE


def peak_bytes() -> int:
    """The most resident memory of this process since :func:`reset_peak`."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Let :func:`peak_bytes` start from what is resident now."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def peak_over_start(function: Callable[[], Any]) -> int:
    """Bytes that ``function`` needs beyond what is resident before it."""
    reset_peak()
    before = resident_bytes()
    function()
    return max(peak_bytes() - before, 0)


def child(module: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """What ``python -m module JSON`` reports: a process of its own."""
    return _last_line([sys.executable, "-m", module, json.dumps(arguments)], environment)


def children(
    processes: int, module: str, environment: Mapping[str, str] | None = None, **arguments: Any
) -> Any:
    """As :func:`child`, of so many processes under torchrun, one thread each."""
    command = [*torchrun(processes), "-m", module, json.dumps(arguments)]
    return _last_line(command, {"OMP_NUM_THREADS": "1", **(environment or {})})


def _last_line(command: list[str], environment: Mapping[str, str] | None) -> Any:
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command,
        cwd=REPO,
        env={**os.environ, **fixed, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(found: Any) -> None:
    """Print what :func:`child` reads, on one rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found))


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """The product's process groups, of this process alone (or of torchrun's, if there are)."""
    from megatron_phf.runtime import device, parallel

    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device.setup()
    device.init_distributed(int(os.environ["LOCAL_RANK"]), timeout_minutes=5)
    yield
    parallel.destroy()  # waits for every rank: not after an error on one of them


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def from_rank_0(make: Callable[[], str]) -> str:
    """What ``make`` returns on rank 0, on all ranks: one model and one file for all of them."""
    from megatron_phf.runtime.together import on_first_rank

    return on_first_rank(make)
