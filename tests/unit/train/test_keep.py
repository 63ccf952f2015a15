"""Which rollouts are trained on: those that the verdict names; the others keep their places."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptPair
from megatron_phf.data.rollouts import Rollout, rollout_to_json
from megatron_phf.rollout.context import Prompts
from megatron_phf.rollout.order import problem_order
from megatron_phf.runtime import parallel
from megatron_phf.train.keep import GradedSource
from megatron_phf.train.metrics import kept_rollouts

PAIRS = [PromptPair(Problem("", "", str(i), i), (i,), (i, i)) for i in range(4)]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "local_share", list)
    monkeypatch.setattr(parallel, "decides_for_model", lambda: True)
    monkeypatch.setattr(parallel, "share_object", lambda value: value)
    monkeypatch.setattr(parallel, "gather_over_data_parallel", lambda value: [value])


@pytest.mark.parametrize(
    ("keep", "kept"), [("correct", [True, False] * 2), ("incorrect", [False, True] * 2)]
)
def test_rollouts_whose_answers_are_not_wanted_are_not_kept(keep: str, kept: list[bool]) -> None:
    """Two of each problem: the first is its answer, the second is none."""
    config = Config().replaced(
        keep_rollouts=keep, rollouts_per_problem=2, global_batch_size=4, grader="exact"
    )
    asked = problem_order(config, PAIRS).share(2)[1]
    assert [a.problem.index for a in asked[::2]] == [a.problem.index for a in asked[1::2]]
    assert asked[0] != asked[2]
    sampled = [
        Rollout(
            pair.student_ids, pair.teacher_ids, (pair.student_ids[0] + (i % 2), 9), (-1.0, -2.0)
        )
        for i, pair in enumerate(asked)
    ]
    decode = lambda ids: f"\\boxed{{{ids[0]}}}"  # noqa: E731
    source = SimpleNamespace(rollouts=lambda iteration: sampled)
    graded = GradedSource(source, config, Prompts(SimpleNamespace(decode=decode), PAIRS, (9,)))
    found = graded.rollouts(2)
    graded.close()
    assert [r.kept for r in found] == kept
    assert [r.response_ids for r in found] == [r.response_ids for r in sampled]
    assert kept_rollouts(found, config) == {"rollouts_kept": 2}
    assert kept_rollouts(found, Config()) == {}
    dropped = found[kept.index(False)]
    assert dropped.trained().response_ids == dropped.trained().log_probs == ()
    assert rollout_to_json(dropped)["kept"] is False
