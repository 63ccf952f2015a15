"""A task that is not mathematics: the answer is a text, graded by comparison; no code is run.

The prompts (``string_match_student.txt``, ``string_match_teacher.txt``) ask for a last line
``Answer: ...``, which must be the problem's answer but for case, spaces and a final dot.

    export PYTHONPATH=examples/tasks
    torchrun tools/evaluate.py --hf-model DIR --eval-data examples/tasks/string_match.jsonl \\
        --student-template examples/tasks/string_match_student.txt --grader string_match:same_text
"""

from __future__ import annotations

from megatron_phf.data.problems import Problem

MARK = "answer:"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def same_text(generation: str, problem: Problem) -> bool:
    """Whether the last ``Answer:`` line of ``generation`` says the problem's answer."""
    lines = [line.strip() for line in generation.splitlines()]
    answers = [line[len(MARK) :] for line in lines if line.casefold().startswith(MARK)]
    return bool(answers) and _plain(answers[-1]) == _plain(problem.answer or "")
