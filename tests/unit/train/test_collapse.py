"""Signs of collapse: what fires, where, with which words; what a checkpoint holds of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.runtime import parallel
from megatron_phf.train import collapse, session
from megatron_phf.train.collapse import CollapseSigns, copied_words

NAN = float("nan")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "gather_over_data_parallel", lambda mine: [mine])
    monkeypatch.setattr(collapse, "on_first_rank", lambda action: action())


class Step:
    """What the signs read of a step's metrics; NaN where its loss is not finite."""

    def __init__(self, length: float, entropy: float, copied: float | None, agree: float) -> None:
        self.values = {
            "rollout_lengths": {"mean": length}, "student_entropy": entropy, "copied_words": copied,
            "teacher_agreement": agree,
        }  # fmt: skip

    def as_json(self) -> dict:
        return self.values


def signs(**flags: object) -> CollapseSigns:
    return CollapseSigns(
        Config().replaced(**{"stop_on_collapse": True, "collapse_steps": 2, **flags})
    )


def run(found: CollapseSigns, steps: list[Step], first: int = 1) -> tuple[int, str] | None:
    for iteration, step in enumerate(steps, start=first):
        found.add(step)
        stop = found.after_step(iteration, step)
        if stop is not None:
            assert not stop.finished  # another process may go on from the checkpoint before
            return iteration, stop.reason
    return None


def series(**changed: list) -> list[Step]:
    """Eight steps at which nothing happens, but for one quantity."""
    usual = {"length": 40.0, "entropy": 0.5, "copied": 0.4, "agree": 0.9}
    rows = {name: changed.get(name, [value] * 8) for name, value in usual.items()}
    return [Step(*row) for row in zip(*rows.values(), strict=True)]


@pytest.mark.parametrize(
    ("changed", "step", "reason"),
    [
        ({}, None, None),
        (
            {"length": [44, 36, 40, 20, 18, 18, 18, 18]},
            5,
            "--stop-on-collapse: response length is 19 over the last 2 step(s), 0.475 times the "
            "first 2's 40, outside 0.5 to 2 times (--collapse-length 0.5)",
        ),
        (
            {"length": [40, 40, 90, 90, 90, 90, 90, 90]},
            4,
            "--stop-on-collapse: response length is 90 over the last 2 step(s), 2.25 times the "
            "first 2's 40, outside 0.5 to 2 times (--collapse-length 0.5)",
        ),
        ({"length": [40, 40, 40, 20, 20, 20, 20, 20]}, None, None),  # not below a half
        (
            {"entropy": [0.5, NAN, 0.5, 0.02, NAN, 0.02, 0.02, 0.02]},
            6,
            "--stop-on-collapse: the student's entropy is 0.02 over the last 2 step(s), 0.04 times "
            "the first 2's 0.5, outside 0.1 to 10 times (--collapse-entropy 0.1)",
        ),
        (
            {"copied": [0.4, 0.4, 0.96, 0.98, 0.98, 0.98, 0.98, 0.98]},
            4,
            "--stop-on-collapse: the share of the reference's words in the responses is 0.97 over "
            "the last 2 step(s), above --collapse-copying 0.95",
        ),
        (
            {"agree": [0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]},
            2,
            "--stop-on-collapse: agreement of student and teacher is 0.25 over the last 2 step(s), "
            "below --collapse-agreement 0.3",
        ),
        ({"copied": [None] * 8}, None, None),  # a replay knows no solutions
    ],
)
def test_which_sign_fires_where(changed: dict, step: int | None, reason: str | None) -> None:
    expected = None if step is None else (step, reason)
    assert run(signs(), series(**changed)) == expected
    off = dict.fromkeys(("collapse_length", "collapse_entropy", "collapse_copying"), 0.0)
    assert run(signs(**off, collapse_agreement=0.0), series(**changed)) is None
    assert run(signs(stop_on_collapse=False), series(**changed)) is None


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_resumed_run_has_the_levels_of_its_first_steps(after: int) -> None:
    steps = series(length=[44, 36, 40, 20, 18, 18, 18, 18])
    before, resumed = signs(), signs()
    assert run(before, steps[:after]) is None
    resumed.load_state(json.loads(json.dumps(before.state())))
    assert run(resumed, steps[after:], after + 1) == run(signs(), steps)
    old = signs()
    old.load_state({})  # a checkpoint of before
    assert run(old, steps[4:]) is None


def test_what_is_logged() -> None:
    found = signs()
    logged = [found.add(step) for step in series(length=[44, 36, 40, 20, 18, 18, 18, 18])]
    assert logged[0] == {"length": 1, "entropy": 1, "copying": 0.4, "agreement": 0.9}
    assert logged[4]["length"] == 19 / 40
    assert "length" not in signs().add(Step(0.0, 0.5, 0.4, 0.9))  # no part of nothing


def test_no_checkpoint_is_written_once_a_sign_has_fired(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    said: list[str] = []

    class Checkpointer:
        def __init__(self, *_: object) -> None: ...

        def save(self, progress: session.Progress, sampled: dict) -> None:
            assert progress.collapse == found.state() and sampled == {}
            saved.append(progress.iteration)

        def finish(self) -> None: ...

    monkeypatch.setattr(session, "Checkpointer", Checkpointer)
    monkeypatch.setattr(session, "say", said.append)
    config, found = Config().replaced(save="ckpt", save_interval=1), signs()
    distiller = SimpleNamespace(nonfinite=SimpleNamespace(total=0, in_a_row=0))
    heartbeat = SimpleNamespace(at=lambda where: None)
    checkpoints = session.Checkpoints(config, distiller, heartbeat, found)
    for iteration, step in enumerate(series(length=[40, 40, 10, 10, 1, 1, 1, 1])[:3], start=1):
        found.add(step)
        found.after_step(iteration, step)
        checkpoints.after_step(iteration, step)
    assert found.fired is None and saved == [1, 2, 3]
    found.fired = "collapse"
    checkpoints.after_step(4, None)
    checkpoints.at_end(4, True)
    assert saved == [1, 2, 3]
    assert said == ["--save ckpt: no checkpoint of a collapsed student; that of step 3 stays"]


def test_words_of_the_reference_in_the_response() -> None:
    """As often as they stand there: recall, whatever else the response says."""
    tokenizer = SimpleNamespace(
        decode=lambda ids: " ".join({1: "Two", 2: "and", 3: "x!"}[i] for i in ids)
    )
    rollouts = [
        Rollout((9,), (9,), (1, 3, 2), reference="two and two: 4"),  # two, and; of 4 words
        Rollout((9,), (9,), (1, 1, 2, 1), reference="two and two"),
        Rollout((9,), (9,), (1,), reference=None),
    ]
    assert copied_words(rollouts, tokenizer) == (0.5 + 1.0) / 2
    assert copied_words(rollouts[2:], tokenizer) is None
    assert copied_words(rollouts, None) is None
