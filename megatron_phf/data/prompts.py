"""The student's and the privileged teacher's prompt for a problem, as token ids.

Wording after OPSD (arXiv:2601.18734), the teacher's transition sentence our own; both templates
can be replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_phf.config.settings import DataConfig
from megatron_phf.data.problems import Problem
from megatron_phf.data.tokenizer import Tokenizer

_CLOSING = "Please reason step by step, and put your final answer within \\boxed{}."
STUDENT_TEMPLATE = "Problem: {problem}\n\n" + _CLOSING
TEACHER_TEMPLATE = (
    "{problem}\n\nHere is a reference solution to this problem:\n{solution}\n\n"
    "Work through this solution until every step of it is clear to you. Then put it aside and "
    "solve the problem yourself: reach the same answer by your own reasoning and in your own "
    "words, without copying or rephrasing the text above.\n" + _CLOSING
)
_PLACEHOLDER = re.compile(r"\{(problem|solution)\}")


def _check(template: str, flag: str, needed: tuple[str, ...]) -> None:
    present = set(_PLACEHOLDER.findall(template))
    for name in needed:
        if name not in present:
            raise ValueError(f"{flag}: the template has no {{{name}}}")
    if flag == "--student-template" and "solution" in present:
        raise ValueError(f"{flag}: {{solution}} would show the student the reference solution")


@dataclass(frozen=True)
class PromptTemplates:
    """Texts with ``{problem}`` and, for the teacher, ``{solution}``; thinking mode of each side.

    Raises:
        ValueError: a placeholder is missing, or the student's template has the solution.
    """

    student: str = STUDENT_TEMPLATE
    teacher: str = TEACHER_TEMPLATE
    student_thinking: bool = False
    teacher_thinking: bool = True

    def __post_init__(self) -> None:
        _check(self.student, "--student-template", ("problem",))
        _check(self.teacher, "--teacher-template", ("problem", "solution"))


def load_template(path: str, flag: str) -> str:
    """The text of a template file named by ``flag``."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except (OSError, ValueError) as error:  # no such file, not UTF-8, no possible path
        raise ValueError(f"{flag} {path}: cannot be read ({error})") from error


def prompt_templates(config: DataConfig) -> PromptTemplates:
    """The user's prompt templates, or the defaults."""
    given = {
        side: load_template(path, f"--{side}-template")
        for side in ("student", "teacher")
        if (path := getattr(config, f"{side}_template")) is not None
    }
    return PromptTemplates(
        **given, student_thinking=config.student_thinking, teacher_thinking=config.teacher_thinking
    )


def fill(template: str, problem: Problem, protect: Callable[[str], str] = str) -> str:
    """Replace the placeholders in one pass: a problem that itself says "{solution}" stays so.

    ``protect``: the tokenizer's, applied to the problem's texts but not to the template.
    """
    values = {"problem": problem.problem, "solution": problem.solution}
    return _PLACEHOLDER.sub(lambda match: protect(values[match[1]]), template)


def problem_prompt(
    tokenizer: Tokenizer, template: str, problem: Problem, thinking: bool
) -> list[int]:
    """Token ids of the problem in the template; its own text is text, whatever it says.

    Raises:
        ValueError: the tokenizer cannot do that, or its chat template fails; names the problem.
    """
    try:
        return tokenizer.prompt(fill(template, problem, tokenizer.protect), thinking)
    except ValueError as error:
        raise ValueError(f"problem {problem.index}: {error}") from error


@dataclass(frozen=True)
class PromptPair:
    """The same problem as both sides are asked it."""

    problem: Problem
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]


def build_prompt_pairs(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    templates: PromptTemplates,
    max_student_tokens: int,
    max_teacher_tokens: int,
    too_long: str = "drop",
) -> tuple[list[PromptPair], int]:
    """Prompts of all problems that fit, and how many did not.

    Raises:
        ValueError: a prompt is too long and ``too_long`` is ``error``, or all are.
    """
    pairs, dropped = [], 0
    for problem in problems:
        student, teacher = (
            problem_prompt(tokenizer, template, problem, thinking)
            for template, thinking in (
                (templates.student, templates.student_thinking),
                (templates.teacher, templates.teacher_thinking),
            )
        )
        sides = (
            (student, max_student_tokens, "student", "--max-prompt-length"),
            (teacher, max_teacher_tokens, "teacher", "--max-teacher-prompt-length"),
        )
        over = next((side for side in sides if len(side[0]) > side[1]), None)
        if over is None:
            pairs.append(PromptPair(problem, tuple(student), tuple(teacher)))
            continue
        dropped += 1
        if too_long == "error" or dropped == len(problems):
            ids, limit, name, flag = over
            count = f"all {dropped} problems are too long; " if dropped == len(problems) else ""
            raise ValueError(
                f"{count}problem {problem.index}: its {name} prompt has {len(ids)} tokens, over "
                f"{flag} {limit}; raise it, or drop such problems with --overlong-prompts drop"
            )
    return pairs, dropped
