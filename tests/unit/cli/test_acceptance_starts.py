"""The acceptance's starts: timeouts, the deadline, what a broken case leaves; and its counts."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_phf.cli.accept import launch
from megatron_phf.cli.accept.plan import PARTS, Case

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
    directory: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], end: float, limit=2.0,
    **parts: float,
) -> tuple[launch.Clock, int]:  # fmt: skip
    """Four cases a start, each a part; two seconds each, once a process is there."""
    script = directory / "acts.py"
    script.write_text(ACTS)
    command = [sys.executable, str(script)]
    monkeypatch.setattr(
        launch, "command", lambda plan, cases, path: [*command, path, str(directory)]
    )
    both = ("parity", "layouts")
    cases = [Case(both[i // 4], name, "job", 1 + i // 4, []) for i, name in enumerate(names)]
    clock, reports = launch.Clock(time.monotonic() + end), []
    clock.parts |= parts
    plan = SimpleNamespace(
        directory=str(directory), path=lambda name: str(directory / name), limit=lambda case: limit
    )
    launch.run_all(plan, cases, clock, lambda: reports.append(1))
    return clock, len(reports)


def test_no_case_takes_another_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ok_1", "hang_1", "fail_1", "ok_2", "ok_3"]
    clock, reports = started(tmp_path, monkeypatch, names, end=200)
    assert clock.problems["fail_1"] == "fail_1 failed\nValueError: broken\n"
    assert clock.problems["hang_1"].startswith("ended after ") and len(clock.problems) == 2
    assert [case["name"] for case in clock.times] == ["ok_1", "ok_2", "ok_3"]
    assert reports == 2  # one after each start


def test_a_part_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves undone is late, and the next part runs; a start is nobody's time."""
    names = ["ok_1", "hang_1", "ok_2", "ok_3", "ok_4"]
    clock, _ = started(tmp_path, monkeypatch, names, end=200, limit=100, parity=0.5)
    assert clock.problems.pop("hang_1").startswith("ended after ")
    assert clock.problems == dict.fromkeys(["ok_2", "ok_3"], launch.LATE)
    assert [case["name"] for case in clock.times] == ["ok_1", "ok_4"]
    assert clock.parts["layouts"] == PARTS["layouts"]


def test_without_an_all_reduce_nothing_else_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SimpleNamespace(directory=str(tmp_path))
    clock = launch.Clock(time.monotonic() + 100)
    starts: list[str] = []

    def fail(plan: object, cases: list[Case], clock: launch.Clock) -> tuple[int, str]:
        starts.append(cases[0].name)
        return 0, "NCCL: no"

    monkeypatch.setattr(launch, "_start", fail)
    cases = [Case("machine", "all_reduce", "all_reduce", 8, []), Case("end", "train", "job", 8, [])]
    launch.run_all(plan, cases, clock, lambda: None)
    assert starts == ["all_reduce"] and clock.problems == {"all_reduce": "NCCL: no"}


def test_a_server_is_killed_amid_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's own children alone, when a server is told of weights, not before."""
    from megatron_phf.cli import cases
    from megatron_phf.rollout.vllm.control import Control

    told: list[dict] = []
    monkeypatch.setattr(Control, "update", lambda self, info: told.append(info))
    with subprocess.Popen(["sleep", "600"]) as server:
        hook = cases.Trouble({"kill_server": True})
        hook.before_step(1)
        Control.update(None, {"step": 1})
        assert server.poll() is None
        hook.before_step(2)
        Control.update(None, {"step": 2})
        assert server.wait(timeout=60) == -9
    assert told == [{"step": 1}, {"step": 2}]


def test_the_deadline_ends_what_runs_and_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["hang_1", "ok_1", "ok_2", "ok_3", "ok_4"]
    clock, _ = started(tmp_path, monkeypatch, names, end=0.5)
    assert clock.problems == dict.fromkeys(names, launch.LATE)


def test_decoding_is_timed_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are required: a capture that fails is an error, not a slower row."""
    from megatron_phf.cli.accept import measure
    from megatron_phf.cli.accept.large import Large
    from megatron_phf.config.flags import parse_args

    asked: list[tuple[str, int]] = []
    config = parse_args(["--hf-model", "m", "--data", "d"])
    models = SimpleNamespace(student=SimpleNamespace(experts=None), vocab_size=9)

    def engine(graphs: str, rows: int) -> object:
        asked.append((graphs, rows))
        made = Large.engine(SimpleNamespace(config=config, models=models, student=[]), graphs, rows)
        assert made._graphs._wanted and made._graphs._required and made._batch_size == rows
        raise InterruptedError

    monkeypatch.setattr(measure.device, "has_cuda", lambda: True)
    case = {"prompt": 4, "rows": 64, "tokens": 8}
    large = SimpleNamespace(case=case, arch=models, engine=engine)
    with pytest.raises(InterruptedError):
        measure.decode(large)
    assert asked == [("on", 64)]


def test_rows_with_other_tokens_are_counted() -> None:
    from megatron_phf.cli.accept import measure

    def engine(graphs: str, rows: int) -> object:
        def generate(prompts: list, sampling: object, ids: range) -> list:
            last = [7 if graphs == "on" and i == 1 else 3 for i in range(rows)]
            return [SimpleNamespace(token_ids=(1, token)) for token in last]

        return SimpleNamespace(generate=generate)

    case = {"prompt": 4, "rows": 3, "tokens": 2}
    large = SimpleNamespace(case=case, arch=SimpleNamespace(vocab_size=9), engine=engine)
    assert measure.graphs(large)["different"] == 1


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
