"""What the teacher is shown: whole prompts of each kind, and one clear error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_phf.cli.preflight import check
from megatron_phf.config.flags import parse_args
from megatron_phf.config.settings import Config
from megatron_phf.data.privileged import KINDS, TeacherView, check_privileged, parse_privileged
from megatron_phf.data.problems import Problem
from megatron_phf.data.prompts import PromptPair, build_prompt_pairs, prompt_templates
from megatron_phf.demo.task import make_problems
from megatron_phf.evaluation.answers import extract_answer, same_answer

CLOSING = "Please reason step by step, and put your final answer within \\boxed{}."
REFERENCE = "Here is a reference solution to this problem:"
AFTER = (
    "Work through this solution until every step of it is clear to you. Then put it aside and "
    "solve the problem yourself: reach the same answer by your own reasoning and in your own "
    f"words, without copying or rephrasing the text above.\n{CLOSING}"
)
PROBLEMS = [
    Problem("2+6?", "2+6=8, so \\boxed{8}.", "8", 0),
    Problem("a third of 1?", "It is 1/3.\n#### 1/3", "1/3", 1),
    Problem("2+6?", "six and two: 8", "8", 2),
    Problem("Red or blue?", "\\boxed{\\text{Blue}}", "blue", 3),
]


class Letters:
    """A tokenizer of one token a character, whose prompts say how they were asked for."""

    def encode(self, text: str) -> list[int]:
        return [*map(ord, text)]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def protect(self, text: str) -> str:
        return text

    def prompts(self, messages: list[str], thinking: bool) -> list[list[int]]:
        return [self.encode(m + (" /think" if thinking else "")) for m in messages]


def pairs_of(kind: str, problems=PROBLEMS, **flags: object) -> list[PromptPair]:
    config = Config().replaced(privileged=kind, seed=3, **flags)
    view = TeacherView(config, problems, Letters())
    templates = prompt_templates(config.data)
    return build_prompt_pairs(Letters(), problems, templates, 999, 999, "error", view)[0]


def shown(kind: str, problems=PROBLEMS) -> list[str]:
    return KINDS[kind].texts(problems, 3)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("solution", f"2+6?\n\n{REFERENCE}\n2+6=8, so \\boxed{{8}}.\n\n{AFTER} /think"),
        (
            "answer",
            "2+6?\n\nHere is the final answer to this problem:\n8\n\nKeep it in mind, and solve "
            f"the problem yourself: reach this answer by your own reasoning.\n{CLOSING} /think",
        ),
        (
            "hint:0.25",
            "2+6?\n\nHere is how a reference solution to this problem begins:\n2+6=8\n\nWork "
            "through this beginning until every step of it is clear to you. Then put it aside and "
            "solve the problem yourself, by your own reasoning and in your own words, without "
            "copying or "
            f"rephrasing the text above.\n{CLOSING} /think",
        ),
        ("other_problem", f"2+6?\n\n{REFERENCE}\nIt is 1/3.\n#### 1/3\n\n{AFTER} /think"),
        ("wrong", f"2+6?\n\n{REFERENCE}\n2+6=4, so \\boxed{{4}}.\n\n{AFTER} /think"),
        ("none", f"Problem: 2+6?\n\n{CLOSING}"),
    ],
)
def test_the_teachers_whole_prompt(kind: str, text: str) -> None:
    pair = pairs_of(kind)[0]
    assert Letters().decode(pair.teacher_ids) == text
    assert Letters().decode(pair.student_ids) == f"Problem: 2+6?\n\n{CLOSING}"
    assert pair.problem == PROBLEMS[0]  # what is graded and copied from stays
    assert pair.at(7) is pair


def test_a_users_template_takes_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("{problem}|{solution}=")
    flags = {"teacher_template": str(tmp_path / "t.txt"), "student_thinking": True}
    for kind, text in (("answer", "2+6?|8="), ("none", f"Problem: 2+6?\n\n{CLOSING}")):
        ids = pairs_of(kind, **flags)[0].teacher_ids
        assert Letters().decode(ids) == text + " /think"


def test_another_problems_solution_is_never_ones_own() -> None:
    """A line that repeats a problem is no other problem; the seed decides, and nothing else."""
    assert shown("other_problem") == [
        "It is 1/3.\n#### 1/3", "\\boxed{\\text{Blue}}", "It is 1/3.\n#### 1/3",
        "2+6=8, so \\boxed{8}.",
    ]  # fmt: skip
    problems = make_problems("train", 200, 1)
    texts, own = shown("other_problem", problems), [p.solution for p in problems]
    assert sorted(texts) == sorted(own)  # a permutation
    assert not any(a == b for a, b in zip(texts, own, strict=True))
    assert texts == shown("other_problem", problems)
    assert texts != KINDS["other_problem"].texts(problems, 4)


@pytest.mark.parametrize(
    ("solution", "answer", "wrong"),
    [
        ("So 12 - 5 = 7.\n#### 7", "7", "So 12 - 5 = 3.\n#### 3"),
        ("\\boxed{\\frac12}", "1/2", "\\boxed{\\frac12}\nThe final answer is \\boxed{7/2}."),
        ("x = 0.5, 10.5 no, \\boxed{0.5}", "0.5", "x = 6.5, 10.5 no, \\boxed{6.5}"),
        (
            "18 = 18.0 \\boxed{18.0}",
            "18",
            "14 = 18.0 \\boxed{18.0}\nThe final answer is \\boxed{14}.",
        ),
        ("it is \\boxed{A}", "A", "it is \\boxed{C}"),
        ("it is so", "-3", "it is so\nThe final answer is \\boxed{-9}."),
    ],
)
def test_a_wrong_solution(solution: str, answer: str, wrong: str) -> None:
    (text, *_) = shown("wrong", [Problem("p", solution, answer, 0), Problem("q", "C", "C", 1)])
    assert text == wrong
    assert same_answer(extract_answer(text), answer) is not True


def test_a_wrong_solution_of_the_embedded_task_is_never_right() -> None:
    problems = make_problems("train", 300, 1)
    for problem, text in zip(problems, shown("wrong", problems), strict=True):
        assert extract_answer(text) != problem.answer
        assert len(text) == len(problem.solution)  # as plausible to look at


def test_a_hint_that_grows_with_the_steps() -> None:
    """Step i of 5: 0.2, 0.4, ... of the ten characters; each step alone, as after a resume."""
    problem = Problem("p", "0123456789", "9", 0)
    (pair,) = pairs_of("hint:0.2-1.0", [problem], train_iters=5)
    (whole,) = pairs_of("hint:1", [problem])
    assert pair == whole  # the longest decides whether it fits
    for step, part in ((4, "01234567"), (1, "01"), (5, "0123456789"), (2, "0123")):
        text = Letters().decode(pair.at(step).teacher_ids)
        assert text.split("begins:\n")[1].split("\n\n")[0] == part
    assert parse_privileged("hint:0.9-0.1").fraction(3, 5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        (PROBLEMS[:1], {"privileged": "other_problem"}, "--data has one problem alone"),
        ([PROBLEMS[0], PROBLEMS[2]], {"privileged": "other_problem"}, "has one problem alone"),
        ([{"problem": "p", "answer": "1"}], {"privileged": "hint:1"}, r"d:1: no field 'solution'"),
        (
            [{"problem": "p", "solution": "s"}],
            {"privileged": "answer"},
            "problem 1 has no 'answer'",
        ),
        ([{"problem": "p", "solution": "s"}], {"privileged": "wrong"}, "problem 1 has no 'answer'"),
        (
            [{"problem": "p", "solution": "s", "answer": "A"}] * 2,
            {"privileged": "wrong"},
            "the answer 'A' of problem 0 has no number to alter",
        ),
        ([], {"privileged": "all"}, "--privileged all: choose one of solution, answer, hint"),
        ([], {"privileged": "hint"}, "--privileged hint: choose one of .* hint as hint:0.3"),
        ([], {"privileged": "wrong:1"}, "--privileged wrong:1: choose one of"),
        ([], {"privileged": "hint:0-1"}, "--privileged hint:0-1: the part .* above 0 to 1"),
        ([], {"privileged": "hint:a"}, "--privileged hint:a: the part"),
        ([], {"privileged": "hint:nan"}, "--privileged hint:nan: the part"),
        ([], {"privileged": "answer", "data": None}, "answer needs --hf-model and --data"),
        (
            [],
            {"privileged": "wrong", "rollout_engine": "replay", "replay_file": "r"},
            "a replay file's what was recorded",
        ),
        (
            [{"problem": "p"}],
            {"privileged": "none", "rollout_engine": "reference"},
            r"d:1: no field 'solution'",
        ),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, lines: list, flags: dict, message: str) -> None:
    content = [x if isinstance(x, dict) else vars(x) for x in lines]
    (tmp_path / "d").write_text("".join(json.dumps(x) + "\n" for x in content))
    with pytest.raises(ValueError, match=message):
        check_privileged(
            Config().replaced(**{"data": str(tmp_path / "d"), **flags}), "replay_file" not in flags
        )


def test_what_needs_no_solution(tmp_path: Path) -> None:
    (tmp_path / "d").write_text('{"problem": "p", "answer": 1}\n')
    for kind in ("none", "answer"):
        check_privileged(Config().replaced(data=str(tmp_path / "d"), privileged=kind), True)


def test_the_checks_before_launch_know_it() -> None:
    with pytest.raises(ValueError, match="--privileged wrong needs --hf-model and --data"):
        check(parse_args(["--privileged", "wrong"]))
