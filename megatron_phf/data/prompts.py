"""The student's and the privileged teacher's prompt for a problem, as token ids.

Wording after OPSD (arXiv:2601.18734), the teacher's transition sentence our own; both templates
can be replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tqdm import tqdm

from megatron_phf.config.settings import DataConfig
from megatron_phf.data.privileged import (
    CLOSING,
    SOLUTION_TEMPLATE,
    TeacherView,
    parse_privileged,
)
from megatron_phf.data.problems import Problem
from megatron_phf.data.tokenizer import Tokenizer

STUDENT_TEMPLATE = "Problem: {problem}\n\n" + CLOSING
# What is tokenised at once: the library does that in parallel.
_BATCH = 256
_SILENT_SECONDS = 2.0
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

    ``privileged`` False: the teacher is asked as the student is.

    Raises:
        ValueError: a placeholder is missing, or the student's template has the solution.
    """

    student: str = STUDENT_TEMPLATE
    teacher: str = SOLUTION_TEMPLATE
    student_thinking: bool = False
    teacher_thinking: bool = True
    privileged: bool = True

    def __post_init__(self) -> None:
        _check(self.student, "--student-template", ("problem",))
        if self.privileged:
            _check(self.teacher, "--teacher-template", ("problem", "solution"))


def load_template(path: str, flag: str) -> str:
    """The text of a template file named by ``flag``."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except (OSError, ValueError) as error:  # no such file, not UTF-8, no possible path
        raise ValueError(f"{flag} {path}: cannot be read ({error})") from error


def prompt_templates(config: DataConfig) -> PromptTemplates:
    """The user's prompt templates, or the defaults of what --privileged shows."""
    kind = parse_privileged(config.privileged).kind
    given = {
        side: load_template(path, f"--{side}-template")
        for side in ("student", "teacher")
        if (path := getattr(config, f"{side}_template")) is not None
    }
    templates = PromptTemplates(
        given.get("student", STUDENT_TEMPLATE),
        given.get("teacher", kind.template),
        student_thinking=config.student_thinking,
        teacher_thinking=config.teacher_thinking,
    )
    if kind.texts is not None:
        return templates
    student, thinking = templates.student, templates.student_thinking
    return replace(templates, teacher=student, teacher_thinking=thinking, privileged=False)


def fill(template: str, problem: Problem, protect: Callable[[str], str] = str) -> str:
    """Replace the placeholders in one pass: a problem that itself says "{solution}" stays so.

    ``protect``: the tokenizer's, applied to the problem's texts but not to the template.
    """
    values = {"problem": problem.problem, "solution": problem.solution}
    return _PLACEHOLDER.sub(lambda match: protect(values[match[1]]), template)


def problem_prompts(
    tokenizer: Tokenizer,
    template: str,
    thinking: bool,
    problems: Sequence[Problem],
    show: bool = False,
) -> list[list[int]]:
    """Token ids of each problem in the template; its own text is text, whatever it says.

    ``show``: with a progress bar where it takes long.

    Raises:
        ValueError: the tokenizer cannot do that, or its chat template fails; names the problem.
    """
    prompts: list[list[int]] = []
    starts = range(0, len(problems), _BATCH)
    hidden = None if show else True  # None: no bar in a file
    for start in tqdm(starts, "prompts", leave=False, delay=_SILENT_SECONDS, disable=hidden):
        part = problems[start : start + _BATCH]
        try:
            texts = [fill(template, problem, tokenizer.protect) for problem in part]
            prompts += tokenizer.prompts(texts, thinking)
        except ValueError as error:
            if len(part) == 1:
                raise ValueError(f"problem {part[0].index}: {error}") from error
            for problem in part:  # one of them raises, with its name
                problem_prompts(tokenizer, template, thinking, [problem])
            raise
    return prompts


# Prompts of some problems.
Encode = Callable[[Sequence[Problem]], list[list[int]]]


@dataclass(frozen=True)
class PromptPair:
    """The same problem as both sides are asked it.

    ``changed``: the teacher's prompt of a step, where it is not the same in all of them.
    """

    problem: Problem
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    changed: Callable[[int], tuple[int, ...]] | None = field(default=None, compare=False)

    def at(self, iteration: int) -> PromptPair:
        """As both sides are asked it in step ``iteration``."""
        return self if self.changed is None else replace(self, teacher_ids=self.changed(iteration))


def build_prompt_pairs(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    templates: PromptTemplates,
    max_student_tokens: int,
    max_teacher_tokens: int,
    too_long: str = "drop",
    view: TeacherView | None = None,
    spread: Callable[[Encode, Sequence[Problem]], list[list[int]]] = lambda make, all_: make(all_),
) -> tuple[list[PromptPair], int]:
    """Prompts of all problems that fit, and how many did not.

    Args:
        view: the problems as the teacher is shown them (default: as they are).
        spread: how the work is done, for instance in shares.

    Raises:
        ValueError: a prompt is too long and ``too_long`` is ``error``, or all are.
    """
    pairs, dropped = [], 0

    def for_teacher(part: Sequence[Problem], step: int | None = None) -> list[list[int]]:
        shown = part if view is None else [view.of(problem, step) for problem in part]
        thinking = templates.teacher_thinking
        return problem_prompts(tokenizer, templates.teacher, thinking, shown, show=step is None)

    thinking = templates.student_thinking
    for_student = partial(problem_prompts, tokenizer, templates.student, thinking, show=True)
    sides = (spread(make, problems) for make in (for_student, for_teacher))
    for problem, student, teacher in zip(problems, *sides, strict=True):
        limits = (
            (student, max_student_tokens, "student", "--max-prompt-length"),
            (teacher, max_teacher_tokens, "teacher", "--max-teacher-prompt-length"),
        )
        over = next((side for side in limits if len(side[0]) > side[1]), None)
        if over is None:
            changed = None
            if view is not None and view.changes:
                changed = lambda i, p=problem: tuple(for_teacher([p], i)[0])  # noqa: E731
            pairs.append(PromptPair(problem, tuple(student), tuple(teacher), changed))
            continue
        dropped += 1
        if too_long == "error" or dropped == len(problems):
            ids, limit, name, flag = over
            count = f"all {dropped} problems are too long; " if dropped == len(problems) else ""
            drop = ", or drop such problems with --overlong-prompts drop"
            raise ValueError(
                f"{count}problem {problem.index}: its {name} prompt has {len(ids)} tokens, over "
                f"{flag} {limit}; raise it{'' if count else drop}"
            )
    return pairs, dropped
