"""What shows a run cannot end it: trackers that fail, disks that are full."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_phf.cli import preflight
from megatron_phf.config.settings import Config
from megatron_phf.data.problems import read_jsonl
from megatron_phf.data.rollouts import Rollout, read_rollouts
from megatron_phf.files.appended import AppendedLines
from megatron_phf.runtime import parallel
from megatron_phf.train import logging, nonfinite, record
from megatron_phf.train.logging import RunLogger
from megatron_phf.train.metrics import StepMetrics


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "is_first_rank", lambda: True)
    monkeypatch.setattr(logging, "on_first_rank", lambda action, *args: action(*args))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logging.tqdm, "write", lines.append)
    return lines


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """``full_disk(n)``: no file grows beyond so many bytes; -1: as they like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def step(tokens: int = 7) -> StepMetrics:
    loss = 0.5 if tokens else float("nan")
    extra = {"seconds": {"student": 1.0}, "tokens_per_second": tokens}
    return StepMetrics(loss, loss, None, {}, loss, 1e-3, loss, "none", None, loss, None, tokens,
                       extra)  # fmt: skip


def config(path: Path, **changed: object) -> Config:
    settings = {"output_dir": str(path), "progress": False, "tensorboard": False, "train_iters": 9}
    return Config().replaced(**{**settings, **changed})


def steps_in(path: Path) -> list[int]:
    return [content["step"] for _, content in read_jsonl(str(path), "RUN")]


class DyingWandb(ModuleType):
    """Its process ends before step 2."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[int] = []

    def init(self, **_: object) -> DyingWandb:
        return self

    def log(self, scalars: dict, step: int) -> None:
        if step > 1:
            raise BrokenPipeError("wandb-core is gone")
        self.logged.append(step)

    def finish(self) -> None:
        raise AssertionError("it is gone")


def test_a_tracker_that_dies_is_warned_of_once(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = DyingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = RunLogger(config(tmp_path, wandb_project="p"))
    for iteration in (1, 2, 3):
        logger.after_step(iteration, step())
    logger.evaluation(3, {"average_at_k": 0.5})
    assert logger.at_end(3, False) is None
    logger.close()
    assert wandb.logged == [1] and steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert [line for line in said if line.startswith("warning")] == [
        "warning: Weights & Biases has failed and hears of no further step "
        "(BrokenPipeError: wandb-core is gone)",
        "warning: Weights & Biases lacks 3 record(s); the run's own files have them",
    ]


def test_a_tracker_that_cannot_begin_is_one_too(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # has no init
    logger = RunLogger(config(tmp_path, wandb_project="p"))
    logger.after_step(1, step())
    logger.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
    assert said[0].startswith("warning: Weights & Biases has failed") and "1 record(s)" in said[-1]


def test_lines_wait_for_a_full_disk(
    tmp_path: Path, said: list[str], full_disk: Callable[[int], None]
) -> None:
    """Metrics and TensorBoard's events; all metrics are there once the disk has room again."""
    logger, path = RunLogger(config(tmp_path, tensorboard=True)), tmp_path / "metrics.jsonl"
    logger.after_step(1, step())
    full_disk(path.stat().st_size + 20)
    for iteration in (2, 3):
        logger.after_step(iteration, step())
        assert steps_in(path) == [1]  # nothing torn behind it
    problem = logger.at_end(3, False)
    assert problem is not None and str(path) in problem and "2 line(s)" in problem
    full_disk(-1)
    logger.after_step(4, step())
    assert steps_in(path) == [1, 2, 3, 4] and logger.at_end(4, False) is None
    logger.close()
    (warning,) = [line for line in said if str(path) in line]
    assert warning.startswith("warning: metrics ") and "the run goes on" in warning


def test_recordings_and_samples_on_a_full_disk(
    tmp_path: Path, said: list[str], full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A step's rollouts wait; samples of a step that is skipped are not there, and that is said."""
    for module in (record, nonfinite):
        monkeypatch.setattr(module, "on_first_rank", lambda action, *args: action(*args))
    for name in ("gather_over_data_parallel", "gather_objects"):
        monkeypatch.setattr(parallel, name, lambda value: [value])
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    rollouts = [Rollout((1,), (2,), (3, 4), (-0.5, -1.0)), Rollout((5,), (6,), (7,), (-2.0,))]
    path, cap = str(tmp_path / "r.jsonl"), config(tmp_path, importance_ratio_cap=2.0)
    source = SimpleNamespace(rollouts=lambda iteration: rollouts)
    recording = record.RecordingSource(source, path, cap, done=0)
    full_disk(10)
    assert recording.rollouts(1) == rollouts
    assert "--record-rollouts" in recording.at_end(1, False) and len(said) == 1
    where = nonfinite._dump(3, rollouts, {1}, cap)
    assert where.startswith(f"samples not written ({tmp_path / 'nonfinite_step_3.jsonl'}: ")
    full_disk(-1)
    assert recording.at_end(1, False) is None and read_rollouts(path, 9) == rollouts
    # With what weighs their tokens, for a replay that does.
    assert nonfinite._dump(3, rollouts, {1}, cap) == f"samples in {tmp_path}/nonfinite_step_3.jsonl"
    assert read_rollouts(str(tmp_path / "nonfinite_step_3.jsonl"), 9) == rollouts[1:]


def test_a_log_on_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logging.tqdm, "write", full)
    logger = RunLogger(config(tmp_path))
    logger.after_step(1, step())
    logger.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_a_step_without_rollouts_has_no_loss(tmp_path: Path, said: list[str]) -> None:
    logger = RunLogger(config(tmp_path))
    logger.after_step(1, step(tokens=0))
    logger.close()
    assert said == ["step 1/9 | no rollout to train on: weights unchanged | 1.00 s"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_lines_are_json_whatever_is_in_them(tmp_path: Path) -> None:
    lines = AppendedLines(str(tmp_path / "new" / "a.jsonl"), "--flag")
    line = {"a": float("nan"), "b": [1.0, float("-inf")], "c": {"d": float("inf"), "e": "é"}}
    assert lines.add([line]) is None
    found = [content for _, content in read_jsonl(str(tmp_path / "new" / "a.jsonl"), "RUN")]
    assert found == [{"a": None, "b": [1.0, None], "c": {"d": None, "e": "é"}}]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (None, "--wandb-project needs the package wandb: pip install wandb, or leave the flag out"),
        ("folder", "--wandb-project needs the package wandb"),
        ("raise ValueError('api_key not\\nconfigured')", "api_key not configured; run `wandb log"),
        ("x = 1", "has no attribute 'login'; run `wandb login`"),
        ("login = lambda: False", None),  # offline
    ],
)
def test_trackers_are_checked_before_launch(
    package: str | None, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory ``wandb`` is what the package itself leaves where it has run."""
    if package is not None:
        (tmp_path / "wandb").mkdir()
        monkeypatch.syspath_prepend(str(tmp_path))
    if package not in (None, "folder"):
        (tmp_path / "wandb" / "__init__.py").write_text(package)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    wanted = config(tmp_path, wandb_project="p")
    if message is None:
        preflight._check_trackers(wanted)
    else:
        with pytest.raises(ValueError, match=message) as caught:
            preflight._check_trackers(wanted)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("RANK", "1")  # which uses none
    preflight._check_trackers(wanted)
    sys.modules.pop("wandb", None)


def test_a_run_without_the_tensorboard_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None)
    )
    with pytest.raises(ValueError, match=r"--tensorboard needs the package tensorboard.*--no-ten"):
        preflight._check_trackers(Config())
