"""Start the acceptance's cases: each has a timeout, so has each part, and all have one deadline.

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

from megatron_phf.cli.accept.plan import MODEL, PARTS, START_SECONDS, Case, Plan
from megatron_phf.runtime.environment import for_children, set_cuda_defaults, torchrun

LATE = "out of time"
_USUAL_START = 20.0  # imports, CUDA, NCCL
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
    parts: dict[str, float] = field(default_factory=lambda: dict(PARTS))  # what each has left

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()


def command(plan: Plan, cases: Sequence[Case], path: str) -> list[str]:
    """Of one start."""
    first = cases[0]
    if first.module == MODEL:
        return [sys.executable, "-m", MODEL, *first.argv]
    return [*torchrun(first.processes), "-m", first.module, path, plan.directory]


def run_all(plan: Plan, cases: Iterable[Case], clock: Clock, done: Callable[[], None]) -> None:
    """Run ``cases`` into ``clock``; ``done`` is called after each start.

    Neighbours of one program and number of processes share a start, but those that start servers.
    """

    def start(case: Case) -> tuple[object, ...]:
        return case.module, case.processes, case.part == "vllm" and case.name

    for _, group in groupby((case for case in cases if case.missing is None), key=start):
        _run_together(plan, list(group), clock)
        done()
        if "all_reduce" in clock.problems:  # nothing else can be right
            return


def _run_together(plan: Plan, cases: list[Case], clock: Clock) -> None:
    while cases:
        late = [case for case in cases if min(clock.left(), clock.parts[case.part]) <= 0]
        clock.problems |= {case.name: LATE for case in late}
        cases = [case for case in cases if case not in late]
        if not cases:
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
    count, began, allowance = 0, time.monotonic(), START_SECONDS
    while count < len(cases):
        ended = process.poll() is not None
        case, now = cases[count], time.monotonic()
        there = os.path.exists(plan.path(f"{case.name}.json"))
        most = min(plan.limit(case), clock.parts[case.part]) + allowance
        if there or ended or clock.left() <= 0 or now - began > most:
            # A start is nobody's time, so far as it is none that hangs.
            clock.parts[case.part] -= max(0.0, now - began - min(allowance, _USUAL_START))
        if there:
            clock.times.append({"name": case.name, "part": case.part,
                                "seconds": round(now - began, 1)})  # fmt: skip
            count, began, allowance = count + 1, now, 0.0
        elif ended:
            return count, None
        elif clock.left() <= 0:
            return count, LATE
        elif now - began > most:
            return count, f"ended after {now - began:.0f} s"
        else:
            time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):  # results are there: it may go
        process.wait(timeout=_GRACE)
    return count, None


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
