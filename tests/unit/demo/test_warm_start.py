"""The warm start of the embedded task: when it ends, and what it reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptPair
from megatron_phf.demo.warm_start import LossReached, warm_start_prompts
from megatron_phf.rollout.context import Prompts
from megatron_phf.rollout.sources import ProblemOrder
from megatron_phf.runtime import parallel


@pytest.mark.parametrize(
    ("losses", "last"),
    [
        ([1.0] + [0.01] * 20, 11),  # mean of steps 2 to 11
        ([0.01] * 9 + [0.5] + [0.01] * 20, 20),  # one high loss stays in ten means
        ([0.03] * 30, None),  # at the value is not below it
    ],
)
def test_it_ends_at_the_mean_loss_of_ten_steps(losses: list[float], last: int | None) -> None:
    hook = LossReached(0.03)
    stops = {
        step: hook.after_step(step, SimpleNamespace(opsd=loss))
        for step, loss in enumerate(losses, start=1)
        if not hook.reached
    }
    assert hook.reached == (last is not None)
    assert [step for step, stop in stops.items() if stop] == ([] if last is None else [last])
    if last is not None:
        assert max(stops) == last and stops[last].finished


def test_the_model_learns_both_prompts_of_a_problem_in_one_batch(monkeypatch) -> None:
    """In the problems' own order, both prompts as the student's."""
    monkeypatch.setattr(parallel, "local_share", list)
    pairs = [PromptPair(Problem(f"{i}", "", "2", i), (i, 2), (i, 3, 4)) for i in range(6)]
    prompts = warm_start_prompts(Prompts("tokenizer", pairs, (9,)), seed=5)
    order = ProblemOrder(prompts.pairs, global_batch_size=4, seed=5)
    for step in (1, 2, 3):
        taken = [(p.student_ids, p.teacher_ids) for p in order.share(step)[1]]
        first, second = 2 * step - 2, 2 * step - 1
        assert taken == [
            ((first, 2), (first, 2)), ((first, 3, 4), (first, 3, 4)),
            ((second, 2), (second, 2)), ((second, 3, 4), (second, 3, 4)),
        ]  # fmt: skip
    assert prompts.stop_ids == (9,)
