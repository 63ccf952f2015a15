"""Problems, prompts, replay files and batches: contents, and one clear error for each mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_phf.data.batch import flow_window, make_sequences
from megatron_phf.data.problems import (
    FieldNames,
    Problem,
    read_jsonl,
    read_problems,
    read_test_problems,
    write_jsonl,
)
from megatron_phf.data.prompts import PromptPair, PromptTemplates, build_prompt_pairs, fill
from megatron_phf.data.rollouts import (
    Rollout,
    read_rollouts,
    read_sampled,
    rollout_to_json,
    write_sampled,
)
from megatron_phf.data.tokenizer import HFTokenizer
from megatron_phf.demo.task import make_problems, make_tokenizer
from megatron_phf.evaluation.grading import average_at_k, bootstrap_interval, is_correct
from megatron_phf.rollout.order import as_rollout
from megatron_phf.rollout.protocol import Response

GOOD = {"problem": "1+1?", "solution": "It is 2.", "answer": "2"}


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return str(path)


def test_read_problems(tmp_path: Path) -> None:
    other = {"problem": "né?", "solution": "s", "answer": 3.5}
    path = write(tmp_path / "d.jsonl", GOOD, "", other, {"problem": "q", "solution": "s"})
    first, second, third = read_problems(path)
    assert first == Problem("1+1?", "It is 2.", "2", 0)
    assert (second.problem, second.answer, second.index) == ("né?", "3.5", 1)
    assert third.answer is None


@pytest.mark.parametrize(
    "number",
    ["0.00001", "1e-05", "1.0", "-0.0", "1E5", "0.10", "12345678901234567890123", "5e-324"],
)
def test_an_answer_is_kept_as_written(tmp_path: Path, number: str) -> None:
    """Python prints 0.00001 as 1e-05, and 0.1234567890123456789 as another number."""
    line = f'{{"problem": "p", "solution": "s", "answer": {number}, "other": 1e-05}}'
    path = write(tmp_path / "d.jsonl", line)
    assert [p.answer for p in read_problems(path)] == [number]
    assert is_correct(f"\\boxed{{{number}}}", number)


@pytest.mark.parametrize(
    ("answer", "state"), [("", "an empty"), ("  ", "an empty"), ("$$", "an empty"), (None, "no")]
)
def test_a_test_problem_has_an_answer(tmp_path: Path, answer: str | None, state: str) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, "", {**GOOD, "answer": answer})
    with pytest.raises(ValueError, match=rf"d\.jsonl:3: problem 2 has {state} 'answer'; see"):
        read_test_problems(path, FieldNames(), "--eval-data")
    assert len(read_problems(path)) == 2  # training needs none


def test_read_problems_with_other_field_names(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"question": "q", "proof": "p", "final": "f"})
    (problem,) = read_problems(path, FieldNames("question", "proof", "final"))
    assert (problem.problem, problem.solution, problem.answer) == ("q", "p", "f")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "x"', r"d\.jsonl:2: not JSON .* one JSON object"),
        ("[1]", r"d\.jsonl:2: not a JSON object but list"),
        ({"problem": "x"}, r"d\.jsonl:2: no field 'solution' .*here: 'problem'.*--solution-field"),
        ({**GOOD, "problem": "  "}, r"d\.jsonl:2: field 'problem' is empty"),
        ({**GOOD, "solution": 3}, r"d\.jsonl:2: field 'solution' is not a string but int"),
        ({**GOOD, "answer": [1]}, r"d\.jsonl:2: field 'answer' is neither string nor number"),
        (
            '{"problem": "x", "solution": "s", "answer": "1", "answer": "2"}',
            r"d\.jsonl:2: has the key 'answer' twice in one object",
        ),
        (
            '{"problem": "x", "solution": "s", "answer": -1' + "0" * 4999 + "}",
            r"d\.jsonl:2: has an integer of 5000 digits, which is too long to read; write it as a",
        ),
    ],
)
def test_bad_problem_lines(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_problems(write(tmp_path / "d.jsonl", GOOD, line))


@pytest.mark.parametrize("first", ["\ufeff\n", "\ufeff  \n", "\ufeff"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, first: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(first + json.dumps(GOOD) + "\n", encoding="utf-8")
    assert [p.answer for p in read_problems(str(path))] == ["2"]


def test_bad_problem_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*cannot be read"):
        read_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="no problems in it"):
        read_problems(write(tmp_path / "d.jsonl", ""))
    (tmp_path / "l.jsonl").write_bytes(b'{"problem": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"l\.jsonl:1: not UTF-8"):
        read_problems(str(tmp_path / "l.jsonl"))


def test_write_jsonl_leaves_the_old_file_at_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": object()}])
    assert len(read_problems(path)) == 1


def test_a_problem_that_speaks_of_placeholders_stays_as_it_is() -> None:
    text = fill("{problem} | {solution}", Problem("what is {solution}?", "{problem}", None, 0))
    assert text == "what is {solution}? | {problem}"


def test_templates_are_checked() -> None:
    with pytest.raises(ValueError, match=r"--student-template: .*no \{problem\}"):
        PromptTemplates(student="solve it")
    with pytest.raises(ValueError, match=r"--teacher-template: .*no \{solution\}"):
        PromptTemplates(teacher="{problem}")
    with pytest.raises(ValueError, match="would show the student the reference solution"):
        PromptTemplates(student="{problem} {solution}")


class ThinkingTokenizer:
    """A chat template that shows which mode it was asked for."""

    chat_template = "yes"
    eos_token_id = 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def apply_chat_template(self, chats, **options) -> list[list[int]]:
        assert options["add_generation_prompt"] is True
        return [[int(options["enable_thinking"]), len(chat[0]["content"])] for chat in chats]


def test_each_side_has_its_own_thinking_mode() -> None:
    problem = Problem("p", "s", None, 0)
    tokenizer = HFTokenizer(ThinkingTokenizer())
    ((pair,), _) = build_prompt_pairs(tokenizer, [problem], PromptTemplates(), 9999, 9999)
    assert (pair.student_ids[0], pair.teacher_ids[0]) == (0, 1)  # the recipe's modes
    templates = PromptTemplates(student_thinking=True, teacher_thinking=False)
    ((pair,), _) = build_prompt_pairs(tokenizer, [problem], templates, 9999, 9999)
    assert (pair.student_ids[0], pair.teacher_ids[0]) == (1, 0)


def test_prompts_that_are_too_long() -> None:
    tokenizer = HFTokenizer(make_tokenizer())
    templates = PromptTemplates("{problem}", "{problem}{solution}")
    problems = [Problem("1+1", "1", "1", 0), Problem("1+1+1+1", "1", "1", 1)]
    pairs, dropped = build_prompt_pairs(tokenizer, problems, templates, 6, 99)
    assert ([p.problem.index for p in pairs], dropped) == ([0], 1)
    with pytest.raises(ValueError, match=r"problem 1: its student prompt has 9 tokens.*length 6"):
        build_prompt_pairs(tokenizer, problems, templates, 6, 99, "error")
    with pytest.raises(ValueError, match=r"all 2 problems are too long.*--max-teacher-prompt"):
        build_prompt_pairs(tokenizer, problems, templates, 99, 2)


def test_replay_round_trip(tmp_path: Path) -> None:
    rollout = Rollout((1, 2), (3,), (4, 5, 6))
    tool = Rollout((1, 2), (3,), (4, 5, 6), response_mask=(True, False, True))
    assert rollout_to_json(tool) == {**rollout_to_json(rollout), "response_mask": [1, 0, 1]}
    lines = [{**rollout_to_json(rollout), "note": "ignored"}, rollout_to_json(tool)]
    lines.append({**rollout_to_json(tool), "response_mask": [True, False, True]})
    assert read_rollouts(write(tmp_path / "r.jsonl", *lines), 7) == [rollout, tool, tool]


def test_a_line_names_its_teacher(tmp_path: Path) -> None:
    """The first where it names none; what the field holds is for nobody where none has a name."""
    lines = [{**GOOD, "teacher": teacher} for teacher in ("code", None, "math")] + [GOOD]
    path = write(tmp_path / "d.jsonl", *lines)
    found = [p.teacher for p in read_problems(path, teachers=("math", "code"))]
    assert found == ["code", "math", "math", "math"]
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "teacher": ["any"]})
    assert [p.teacher for p in read_problems(path)] == [None, None]
    with pytest.raises(ValueError, match=r"d\.jsonl:2: field 'teacher' is \['any'\], but .*math"):
        read_problems(path, teachers=("math",))


def test_a_recorded_rollout_names_its_teacher(tmp_path: Path) -> None:
    problem = Problem("1+1?", "2", None, 0, "code")
    rollout = as_rollout(PromptPair(problem, (1,), (2,)), Response([3]))
    line = rollout_to_json(rollout)
    assert line["teacher"] == "code" and "teacher" not in rollout_to_json(Rollout((1,), (2,), (3,)))
    path = write(tmp_path / "r.jsonl", line, {**line, "teacher": None})
    assert [r.teacher for r in read_rollouts(path, 7, ["math", "code"])] == ["code", "math"]
    assert [r.teacher for r in read_rollouts(path, 7)] == [None, None]
    with pytest.raises(ValueError, match=r"r\.jsonl:1: field 'teacher' is 'code', but .*math"):
        read_rollouts(path, 7, ["math"])
    write_sampled(path, {4: [rollout]})  # waits in a checkpoint
    assert [r.teacher for r in read_sampled(path)[4]] == ["code"]


def test_a_replay_is_parsed_once_until_it_changes(tmp_path: Path, monkeypatch) -> None:
    """The check before launch and the run read the same; each has a list of its own."""
    line, parsed = rollout_to_json(Rollout((1, 2), (3,), (4,))), []

    def lines(path: str, flag: str) -> Iterator[tuple[int, dict]]:
        parsed.append(path)
        return read_jsonl(path, flag)

    monkeypatch.setattr("megatron_phf.data.rollouts.read_jsonl", lines)
    path = write(tmp_path / "r.jsonl", line)
    first = read_rollouts(path, 7)
    first.clear()
    assert len(read_rollouts(path, 7)) == 1 and len(parsed) == 1
    assert len(read_rollouts(write(tmp_path / "r.jsonl", line, line), 7)) == 2
    with pytest.raises(ValueError, match=r"r.jsonl:1: .*4"):
        read_rollouts(path, 4)
    assert len(parsed) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_ids": None}, r"r\.jsonl:1: 'response_ids' is not a list of token ids"),
        ({"response_ids": [True]}, "is not a list of token ids"),
        ({"student_prompt_ids": []}, "'student_prompt_ids' is empty; remove the line"),
        ({"student_prompt_ids": [7]}, "from 7 to 7, but .* 0 to 7 - 1; .*another model"),
        ({"teacher_prompt_ids": [-1]}, "from -1 to -1"),
        ({"response_mask": [1, 0]}, "'response_mask' is not a list of 1 zeros and ones"),
        ({"response_mask": [2]}, "'response_mask' is not a list of 1 zeros and ones"),
        ({"response_mask": "1"}, "'response_mask' is not a list of 1 zeros and ones"),
        ({"response_mask": [[1]]}, "'response_mask' is not a list of 1 zeros and ones"),
    ],
)
def test_bad_replay_lines(tmp_path: Path, change: dict, message: str) -> None:
    line = {"student_prompt_ids": [1], "teacher_prompt_ids": [1], "response_ids": [1], **change}
    with pytest.raises(ValueError, match=message):
        read_rollouts(write(tmp_path / "r.jsonl", line), 7)


def test_replay_line_without_a_field(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"student_prompt_ids": [1], "teacher_prompt_ids": [1]})
    with pytest.raises(
        ValueError, match=r"r\.jsonl:1: no field 'response_ids'; needed are student_"
    ):
        read_rollouts(path, 7)


def test_batch_positions() -> None:
    rollouts = [Rollout((1, 2, 3), (4,), (5, 6)), Rollout((7,), (8, 9), (10, 11, 12))]
    (student,), (teacher,) = make_sequences(
        rollouts, [[0, 1]], flow_window(2, "even"), length_multiple=4, equal_lengths=True
    )
    assert student.tokens.tolist() == [[1, 2, 3, 5, 6, 0, 0, 0], [7, 10, 11, 12, 0, 0, 0, 0]]
    assert teacher.tokens.tolist() == [[4, 5, 6, 0, 0, 0, 0, 0], [8, 9, 10, 11, 12, 0, 0, 0]]
    for side in (student, teacher):  # each position predicts the token after it
        assert side.target_ids().tolist() == [5, 6, 10, 11, 12]
        shown = side.tokens.gather(1, side.window)  # the window is at the tokens themselves
        assert shown.tolist() == [[5, 6], [10, 12]]
    assert torch.equal(student.scored, teacher.scored)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_the_student_did_not_write_are_read_and_not_scored(packed: bool) -> None:
    tool = Rollout((1, 2), (3,), (4, 5, 6, 7, 8), None, (True, False, False, True, True))
    none = Rollout((9,), (9, 9), (5, 5), None, (False, False))
    plain = Rollout((9,), (9, 9), (6, 7))
    (student,), (teacher,) = make_sequences(
        [tool, none, plain], [[0, 1, 2]], flow_window(2, "even"), packed=packed
    )
    for side, prompts in ((student, (2, 1, 1)), (teacher, (1, 2, 2))):
        assert side.target_ids().tolist() == [4, 7, 8, 6, 7]
        assert int((~side.padding).sum()) == sum(prompts) + 9  # all are read
        rows = side.tokens.expand(3, -1)
        shown = rows.gather(1, side.window).masked_fill(~side.window_valid, -1)
        assert shown.tolist() == [[4, 8], [-1, -1], [6, 7]]  # both ends of what is scored


def test_microbatches_share_one_length() -> None:
    rollouts = [Rollout((1,), (1,), (2,) * n) for n in (1, 5, 2, 3)]
    order = [[0], [1], [2], [3]]
    students, _ = make_sequences(rollouts, order, flow_window(8, "even"), equal_lengths=True)
    assert [student.tokens.shape for student in students] == [(1, 6)] * 4
    assert [int(student.scored.sum()) for student in students] == [1, 5, 2, 3]


def test_arithmetic_is_deterministic_disjoint_and_right() -> None:
    train, held_out = make_problems("train", 300, 1), make_problems("heldout", 60, 1)
    assert train == make_problems("train", 300, 1)
    assert train != make_problems("train", 300, 2)
    for seed in (1, 2):
        texts = {p.problem for p in make_problems("train", 3000, seed)}
        assert not texts & {p.problem for p in held_out}
    for problem in train:
        assert eval(problem.problem) % 10 == int(problem.answer)
        assert is_correct(problem.solution, problem.answer)
        *steps, _ = problem.solution.split(";")
        assert all(eval(left) % 10 == int(right) for left, right in (s.split("=") for s in steps))


def test_arithmetic_tokenizer_round_trip() -> None:
    tokenizer = make_tokenizer()
    text = make_problems("train", 1, 3)[0].solution
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id not in ids  # the unknown token


@pytest.mark.parametrize(
    ("text", "answer", "good"),
    [
        (r"so \boxed{72}.", "72", True),
        (r"\boxed{1} no, \boxed{72}", "72", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{\text{blue}}", "blue", True),
        (r"\boxed{72", "72", False),
        ("#### 72", "72", True),
        ("72", "72", False),
        (r"\boxed{72}", "73", False),
    ],
)
def test_grading(text: str, answer: str, good: bool) -> None:
    assert is_correct(text, answer) is good


def test_average_at_k() -> None:
    assert average_at_k([[True, False], [True, True]]) == 0.75
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.5 < high < 0.62
    assert bootstrap_interval([0.3] * 10) == pytest.approx((0.3, 0.3))
