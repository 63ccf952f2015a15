"""Where rollouts come from when nothing samples them, and in which order problems are taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptPair
from megatron_phf.rollout.context import Prompts, RolloutContext
from megatron_phf.rollout.order import ProblemOrder, ResponseRoom
from megatron_phf.rollout.sources import ReferenceSource, reference_source
from megatron_phf.runtime import parallel
from megatron_phf.teacher.architecture import Models

STOP = 9


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "local_share", list)


def pairs(count: int) -> list[PromptPair]:
    """Problem i has the solution of i + 1 digits 1."""
    return [PromptPair(Problem("", "1" * (i + 1), None, i), (i,), (i, i)) for i in range(count)]


def test_every_problem_once_an_epoch_in_another_order() -> None:
    order = ProblemOrder(pairs(6), global_batch_size=3, seed=4)
    taken = [[p.problem.index for p in order.share(step)[1]] for step in range(1, 5)]
    first, second = taken[0] + taken[1], taken[2] + taken[3]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert order.share(4)[0] == [9, 10, 11]
    again = ProblemOrder(pairs(6), global_batch_size=3, seed=4)
    assert [p.problem.index for p in again.share(3)[1]] == taken[2]


def test_a_step_asks_the_teacher_as_that_step_does() -> None:
    changing = PromptPair(Problem("", "", None, 0), (1,), (9, 9), lambda step: (step,))
    order = ProblemOrder([changing], global_batch_size=1, seed=4)
    assert [order.share(step)[1][0].teacher_ids for step in (3, 1)] == [(3,), (1,)]


def test_reference_solutions_end_with_a_stop_token_where_there_is_room() -> None:
    order = ProblemOrder(pairs(4), global_batch_size=4, seed=1)
    source = ReferenceSource(
        lambda text: [int(c) for c in text], STOP, order, ResponseRoom(32, 32, 3)
    )
    rollouts = {r.student_prompt_ids[0]: r for r in source.rollouts(1)}
    assert [rollouts[i].response_ids for i in range(4)] == [
        (1, STOP), (1, 1, STOP), (1, 1, 1), (1, 1, 1),
    ]  # fmt: skip
    assert rollouts[2].teacher_prompt_ids == (2, 2)


@pytest.mark.parametrize(("eos", "last"), [(9, 9), (None, 3)])
def test_a_reference_solution_ends_with_the_tokenizers_eos(eos: int | None, last: int) -> None:
    """And not with the smallest of all stop tokens, which may be another format's."""
    tokenizer = SimpleNamespace(encode=lambda text: [5], eos_id=eos)
    arch = SimpleNamespace(vocab_size=20, max_position_embeddings=64)
    config = Config().replaced(hf_model="m", rollout_engine="reference", global_batch_size=1)
    prompts = Prompts(tokenizer, pairs(1), (3, 9))
    source = reference_source(RolloutContext(config, Models(arch), prompts, lambda: []))
    assert source.rollouts(1)[0].response_ids == (5, last)


def test_a_response_ends_where_either_model_does() -> None:
    pair = pairs(1)[0]  # prompts of one and of two tokens
    assert ResponseRoom(10, 10, 99).of(pair) == 8
    assert ResponseRoom(6, 10, 99).of(pair) == 5
    assert ResponseRoom(6, 10, 4).of(pair) == 4
