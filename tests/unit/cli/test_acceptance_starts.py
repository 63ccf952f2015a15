"""The acceptance's starts: timeouts, the deadline, what a broken case leaves; and its counts."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_phf.cli.accept import launch
from megatron_phf.cli.accept.plan import Case

# What a start does with its cases: name -> "ok", "fail" (ends the process) or "hang".
ACTS = """
import json, sys, time
from pathlib import Path
cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
for case in cases:
    act = case["name"].split("_")[0]
    if act == "hang":
        time.sleep(100)
    if act == "fail":
        print("case", case["name"], "failed\\nValueError: broken", flush=True)
        sys.exit(1)
    Path(output, case["name"] + ".json").write_text("{}")
"""


def started(
    directory: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], end: float
) -> tuple[launch.Clock, int]:
    """Four cases a start; two seconds each, once a process is there."""
    script = directory / "acts.py"
    script.write_text(ACTS)
    command = [sys.executable, str(script)]
    monkeypatch.setattr(
        launch, "command", lambda plan, cases, path: [*command, path, str(directory)]
    )
    cases = [Case(i // 4, name, "", [], 0.1, 2.0) for i, name in enumerate(names)]
    clock, reports = launch.Clock(time.monotonic() + end), []
    plan = SimpleNamespace(directory=str(directory), path=lambda name: str(directory / name))
    launch.run_all(plan, cases, clock, lambda: reports.append(1))
    return clock, len(reports)


def test_no_case_takes_another_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ok_1", "hang_1", "fail_1", "ok_2", "ok_3"]
    clock, reports = started(tmp_path, monkeypatch, names, end=200)
    assert clock.problems["fail_1"] == "fail_1 failed\nValueError: broken\n"
    assert clock.problems["hang_1"].startswith("ended after ") and len(clock.problems) == 2
    assert [case["name"] for case in clock.times] == ["ok_1", "ok_2", "ok_3"]
    assert reports == 2  # one after each start


def test_the_deadline_ends_what_runs_and_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["hang_1", "ok_1", "ok_2", "ok_3", "ok_4"]
    clock, _ = started(tmp_path, monkeypatch, names, end=0.5)
    assert clock.problems == dict.fromkeys(names, launch.LATE)


@pytest.mark.parametrize(
    ("busy", "expected"),
    [([0, 0], 0.01), ([5, 0, 0, 0], 0.01), ([5, 0] * 3, 0.22 / 17)],
)
def test_a_busy_machine_makes_no_absurd_speed(busy: list[float], expected: float) -> None:
    """A batch takes 0.05 s and 0.01 s a token; ``busy``: by how much each is late.

    Where each short batch is late, the prompts are in the figure.
    """
    from megatron_phf.cli.accept.measure import token_seconds

    late = iter(busy)
    seconds = token_seconds(lambda tokens: 0.05 + 0.01 * tokens + next(late), 1, 16)
    assert seconds == pytest.approx(expected)


def test_synchronisations_are_counted_by_phase_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_phf.cli.accept import measure

    modes: list[str] = []
    monkeypatch.setattr(measure.device, "has_cuda", lambda: True)
    monkeypatch.setattr(measure.torch.cuda, "set_sync_debug_mode", modes.append)

    def step(distiller: object, timer: measure.PhaseTimer | None = None) -> None:
        if timer is not None:
            for phase, count in (("teacher", 1), ("student", 3)):
                timer._entered(phase)
                for _ in range(count):
                    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
                warnings.warn("something else", stacklevel=1)

    found = measure.synchronisations(SimpleNamespace(distiller=lambda: None, step=step))
    assert found["phases"] == {"teacher": 1, "student": 3}
    (phase, where, count), _ = found["places"]
    assert (phase, count) == ("student", 3)
    assert where.startswith("tests/unit/cli/test_acceptance_starts.py:")
    assert modes == ["warn", "default"]
