"""The demonstration as runs of the training job: which, in which order, and after a signal."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_phf.config.flags import parse_args
from megatron_phf.demo import study


@pytest.fixture
def demo(monkeypatch) -> tuple[study.Demo, list[tuple], dict[str, Any]]:
    """A demonstration whose runs are noted; ``short``: the number of the one that is cut."""
    runs: list[tuple] = []
    state: dict[str, Any] = {"short": None}

    def train(config, signals, heartbeat, prompts, more=(), brief=False):
        alpha, where = config.method.phf_alpha, config.output.output_dir
        runs.append((config.output.run_name, config.train.seed, alpha, where, brief))
        return [None] * (config.train.train_iters - (len(runs) == state["short"]))

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "say", lambda text: None)
    job = parse_args(["--output-dir", "d", "--demo-seeds", "2", "--seed", "7"])
    return study.Demo(job, "d/initial_model", None, None, None), runs, state


def test_the_summary_is_of_this_demonstration_alone(demo, monkeypatch) -> None:
    """Not of runs of other seeds that lie in the same directory."""
    seen: list[str] = []
    monkeypatch.setattr(study, "read_variants", seen.extend)
    with pytest.raises(TypeError):  # nothing was read
        study._write_results(demo[0], {})
    assert seen == ["d/opsd/seed7", "d/phf/seed7", "d/opsd/seed8", "d/phf/seed8"]


def test_pictures_that_cannot_be_drawn_end_nothing(demo, monkeypatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    written: list[str] = []
    monkeypatch.setattr(study, "read_variants", lambda paths: [])
    monkeypatch.setattr(study, "_summary", lambda job, variants: {"eval_samples": 4})
    monkeypatch.setattr(study, "_verdict", lambda summary: "82.7 %")
    monkeypatch.setattr(study, "write_json", lambda path, content: written.append(path))
    monkeypatch.setattr(study, "write_report", full)
    text = study._write_results(demo[0], {})
    assert written == ["d/summary.json"] and text.startswith("82.7 %\nwarning: no report (")
    assert text.endswith("No space left on device); make it with: python tools/report.py d")


def test_both_methods_over_the_seeds(demo) -> None:
    study_, runs, _ = demo
    assert study._run_arms(study_)
    assert runs == [
        ("opsd", 7, 0.0, "d/opsd/seed7", False),  # the first one is shown whole
        ("phf", 7, 0.5, "d/phf/seed7", True),
        ("opsd", 8, 0.0, "d/opsd/seed8", True),
        ("phf", 8, 0.5, "d/phf/seed8", True),
    ]


def test_a_run_that_a_signal_ends_is_the_last(demo) -> None:
    study_, runs, state = demo
    state["short"] = 2
    assert not study._run_arms(study_)
    assert [run[:2] for run in runs] == [("opsd", 7), ("phf", 7)]


@pytest.mark.parametrize(
    ("interval", "meaning"),
    [
        ([-0.012, 0.024], "no difference can be seen on this task at this rate."),
        ([0.001, 0.011], "better on this task at this rate."),
        ([-0.011, -0.001], "worse on this task at this rate."),
    ],
)
def test_the_difference_is_said_with_its_interval(interval: list[float], meaning: str) -> None:
    text = study._meaning({"mean": 0.006, "interval_95": interval, "over": "3 seeds"})
    low, high = (100 * end for end in interval)
    assert text == (
        f"OPSD + PHF is +0.6 points from OPSD, 95 % interval {low:+.1f} to {high:+.1f} over 3 "
        f"seeds: {meaning}"
    )


def test_a_difference_without_an_interval_says_nothing() -> None:
    text = study._meaning({"mean": 0.1, "interval_95": [None, None], "over": ""})
    assert text == "One evaluation each says nothing about which method is better."
