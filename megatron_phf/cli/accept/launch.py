"""Start the acceptance's cases: each has a timeout, and all have one deadline.

None takes another with it: what a broken or hanging case leaves undone is started again without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from megatron_phf.cli.accept.plan import CASES, MEASURE, MODEL, START_LIMIT, Case, Plan
from megatron_phf.runtime.environment import for_children, set_cuda_defaults, torchrun

LATE = "out of time"
_GRACE = 45.0  # torchrun needs 30 to end ranks that do not react


def _environment() -> dict[str, str]:
    given = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    set_cuda_defaults(given)
    return for_children(given)


@dataclass
class Clock:
    """Ends the whole run; ``problems``: by case, ``times``: what each took."""

    end: float
    problems: dict[str, str] = field(default_factory=dict)
    times: list[dict] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()


def command(plan: Plan, cases: Sequence[Case], path: str) -> list[str]:
    """Of one start."""
    if cases[0].kind == MODEL:
        return [sys.executable, "-m", MODEL, *cases[0].argv]
    module = MEASURE if cases[0].settings else CASES
    return [*torchrun(plan.processes), "-m", module, path, plan.directory]


def run_all(plan: Plan, cases: Iterable[Case], clock: Clock, done: Callable[[], None]) -> None:
    """Run ``cases`` into ``clock``; ``done`` is called after each start."""
    for _, group in groupby(cases, key=lambda case: case.start):
        _run_together(plan, list(group), clock)
        done()


def _run_together(plan: Plan, cases: list[Case], clock: Clock) -> None:
    while cases:
        if clock.left() <= 0:
            clock.problems |= {case.name: LATE for case in cases}
            return
        count, problem = _start(plan, cases, clock)
        if problem is not None and count < len(cases):
            clock.problems[cases[count].name] = problem
            count += 1
        cases = cases[count:]


def _start(plan: Plan, cases: list[Case], clock: Clock) -> tuple[int, str | None]:
    """(cases that are done, what went wrong with the next one)."""
    name = cases[0].name
    path, log = plan.path(f"{name}.cases.json"), plan.path(f"{name}.log")
    Path(path).write_text(json.dumps([case.as_json() for case in cases]), encoding="utf-8")
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command(plan, cases, path), env=_environment(),
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            count, problem = _watch(plan, process, cases, clock)
        finally:
            _end(process)
    if problem is None and count < len(cases):
        problem = _words(Path(log).read_text(encoding="utf-8"))
    return count, problem


def _watch(
    plan: Plan, process: subprocess.Popen, cases: list[Case], clock: Clock
) -> tuple[int, str | None]:
    """Wait for one result after the other; a problem where one takes too long."""
    count, began, allowance = 0, time.monotonic(), START_LIMIT
    while count < len(cases):
        ended = process.poll() is not None
        now = time.monotonic()
        if os.path.exists(plan.path(f"{cases[count].name}.json")):
            clock.times.append(_time(cases[count], now - began))
            count, began, allowance = count + 1, now, 0.0
            continue
        if ended:
            return count, None
        if clock.left() <= 0:
            return count, LATE
        if now - began > allowance + cases[count].limit:
            return count, f"ended after {now - began:.0f} s"
        time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):  # results are there: it may go
        process.wait(timeout=_GRACE)
    return count, None


def _time(case: Case, seconds: float) -> dict:
    return {
        "name": case.name, "seconds": round(seconds, 1), "expected": round(case.seconds, 1),
        "limit": round(case.limit, 1),
    }  # fmt: skip


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()  # torchrun ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _words(log: str) -> str:
    """The case's own words where it came to any, else the end of the log."""
    said = log.partition("\ncase ")[2] or log.removeprefix("case ") * log.startswith("case ")
    return said[:3000] or log[-3000:]
