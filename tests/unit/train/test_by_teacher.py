"""Microbatches of several teachers: each has one, those of one follow one another."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout
from megatron_phf.hidden.rows import SequenceShards
from megatron_phf.runtime import parallel
from megatron_phf.train.batch import StepBatch, make_batch
from megatron_phf.train.by_teacher import metrics_by_teacher
from megatron_phf.train.metrics import OutputLoss

NAMES = ("math", "code", "tex")
TWO = {"teacher_hf_model": ",".join(f"{name}=nowhere/{name}" for name in NAMES)}
BUDGETS = {
    "one": {},
    "padded": {"max_tokens_per_microbatch": 30},
    "packed": {"max_tokens_per_microbatch": 30, "pack_sequences": True},
}


def rollouts(seed: int, names: tuple[str | None, ...]) -> list[Rollout]:
    """Each with its own number as all of its tokens."""
    dice = random.Random(seed)
    return [
        Rollout((i,) * 3, (i,) * 5, (i,) * dice.randint(1, 20), teacher=dice.choice(names))
        for i in range(9)
    ]


def read(batch: StepBatch, packed: bool) -> list[list[int]]:
    """The numbers of the rollouts that the student reads in each microbatch."""
    found = []
    for student in batch.students:
        starts = student.cu_seqlens[:-1].tolist() if packed else [0] * len(student.tokens)
        rows = [0] * len(starts) if packed else range(len(starts))
        cells = zip(rows, starts, strict=True)
        found.append([int(student.tokens[row, start]) for row, start in cells])
    return found


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(4))
def test_microbatches(seed: int, budget: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rollout is in one, with its own teacher; ``ranks``: another rank has so many more."""
    monkeypatch.setattr(parallel, "gather_over_data_parallel", lambda n: [n, min(n + ranks, 9)])
    config = Config().replaced(**TWO, **BUDGETS[budget])
    given = rollouts(seed, (*NAMES, None)[: seed + 1])
    batch = make_batch(given, config, SequenceShards())
    assert sorted(i for rows in batch.order for i in rows) == [*range(9)]
    assert read(batch, budget == "packed") == batch.order
    for rows, name in zip(batch.order, batch.teacher_names, strict=True):
        assert {given[i].teacher or "math" for i in rows} == {name}
    assert batch.teacher_names == sorted(batch.teacher_names, key=NAMES.index)


@pytest.mark.parametrize("budget", BUDGETS)
def test_without_names_nothing_changes(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is the one of length, or the given one; names in the rollouts are for nobody."""
    monkeypatch.setattr(parallel, "gather_over_data_parallel", lambda n: [n])
    config = Config().replaced(teacher_hf_model="nowhere", **BUDGETS[budget])
    orders = [
        make_batch(rollouts(1, names), config, SequenceShards()).order for names in (NAMES, (None,))
    ]
    lengths = [len(r.response_ids) for r in rollouts(1, NAMES)]
    wanted = [[i] for i in range(9)]
    assert (orders[0] == wanted) == (budget == "one")
    found = [lengths[rows[0]] for rows in orders[0]]
    assert budget == "one" or found == sorted(found, reverse=True)
    assert make_batch(rollouts(1, NAMES), config, SequenceShards()).teacher_names == []


def test_means_by_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand; one of which nothing is known, one that has read nothing, another rank's tokens."""

    def output(values: list[float], entropy: float) -> OutputLoss:
        own, same = torch.tensor(values), torch.ones(len(values))
        return OutputLoss(own, 0 * own, entropy * same, 0 * own, same, torch.zeros(len(values)))

    def twice(sums: torch.Tensor) -> None:
        sums *= 2

    monkeypatch.setattr("torch.distributed.all_reduce", twice)
    monkeypatch.setattr(parallel, "tensor_parallel_rank", lambda: 0)
    outputs = [output([1.0, 2.0], 0.5), output([6.0], 0.25), output([3.0], float("nan"))]
    assert metrics_by_teacher(outputs, ["math", "math", "code"], NAMES) == {
        "opsd_by_teacher": {"math": 3.0, "code": 3.0, "tex": None},
        "teacher_entropy_by_teacher": {"math": pytest.approx(1.25 / 3), "code": None, "tex": None},
        "teacher_agreement_by_teacher": {"math": 1.0, "code": 1.0, "tex": None},
        "rollout_tokens_by_teacher": {"math": 6, "code": 2, "tex": 0},
    }
    assert metrics_by_teacher(outputs, [], ()) == {}
