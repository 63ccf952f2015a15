"""Average@k, pass@k, majority@k from known answers, and what of them stays on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_phf.data.problems import Problem
from megatron_phf.evaluation.evaluate import Answer, Evaluation, joined, majority
from megatron_phf.evaluation.generations import GenerationStore
from megatron_phf.runtime import parallel
from megatron_phf.train.evaluation import EvaluationLog


def answer(value: str | None, correct: bool) -> Answer:
    return Answer(f"\\boxed{{{value}}}", 5, value, correct, cut=value is None)


def row(text: str, right: str) -> list[Answer]:
    """One answer a word, - for none."""
    values = [None if word == "-" else word for word in text.split()]
    return [answer(value, value == right) for value in values]


def evaluation() -> Evaluation:
    problems = [Problem(f"p{i}", "", "1", i) for i in range(4)]
    rows = [row("1 1 2 3", "1"), row("2 1 2 2", "1"), row("- - - 1", "1"), row("- - - -", "1")]
    return Evaluation(problems, rows, 1.5)


def test_numbers_by_hand() -> None:
    e = evaluation()
    assert e.average == pytest.approx((2 + 1 + 1 + 0) / 16)
    assert e.pass_at_k == 3 / 4
    assert e.majority_at_k == 2 / 4  # the vote of the second is wrong, the fourth has none
    low, high = e.interval
    assert 0 <= low < e.average < high <= 1
    record = e.record(shown=2)
    assert (record["k"], record["problems"], record["cut"]) == (4, 4, 7 / 16)
    assert [s["problem"] for s in record["samples"]] == ["p0", "p1"]
    assert "Average@4 25.00 %" in e.describe()


def test_majority() -> None:
    assert majority(["a", "b", "b"]) == 1
    assert majority(["a", "b", "b", "a"]) == 0  # the earliest wins a tie
    assert majority([None, None, "c"]) == 2
    assert majority([None]) is None


def test_an_evaluation_goes_on_where_it_ended(tmp_path: Path) -> None:
    whole = evaluation()
    parts = [Evaluation([p], [r], 0.0) for p, r in zip(whole.problems, whole.answers, strict=True)]
    directory, settings = str(tmp_path / "new"), {"k": 4, "sampling": {"stop_ids": (1, 2)}}
    store = GenerationStore(directory, settings)
    assert store.done(whole.problems) == []
    store.add(joined(parts[:2]))
    with open(tmp_path / "new" / "generations.jsonl", "a") as f:
        f.write('{"problem": "p2", "answers": [{"te')  # the process died here
    again = GenerationStore(directory, settings)
    assert again.done(whole.problems) == parts[:2]
    again.add(joined(parts[2:]))
    assert joined(again.done(whole.problems)).answers == whole.answers
    again.finish(whole)
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["average_at_k"] == 0.25


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "is_first_rank", lambda: True)
    monkeypatch.setattr(parallel, "broadcast_object", lambda value, group: value)
    log = EvaluationLog(str(tmp_path))
    for step in (0, 10, 20):
        log.add(step, evaluation())
    assert "best 25.00 % after step 0, last 25.00 % after step 20" in log.describe()
    assert set(EvaluationLog(str(tmp_path), done=15).averages) == {0, 10}
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10]
    assert EvaluationLog(str(tmp_path), done=0).averages == {}  # a run of its own


def test_another_evaluations_directory_is_refused(tmp_path: Path) -> None:
    whole, directory = evaluation(), str(tmp_path)
    GenerationStore(directory, {"k": 4}).add(whole)
    with pytest.raises(ValueError, match=r"other settings \(k\); name another directory"):
        GenerationStore(directory, {"k": 5})
    with pytest.raises(ValueError, match="line 1 is not problem 1 of the data"):
        GenerationStore(directory, {"k": 4}).done([Problem("other", "", "1", 0)])
    path = tmp_path / "generations.jsonl"
    path.write_text('{"problem": "p0", "answers": [{"text": "x"}]}\n')
    with pytest.raises(ValueError, match=r"generations\.jsonl:1: not a line of tools/evaluate"):
        GenerationStore(directory, {"k": 4}).done(whole.problems)
