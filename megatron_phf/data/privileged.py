"""What the teacher is shown beside the problem (--privileged): a kind is a row of ``KINDS``.

The solution is OPSD's (arXiv:2601.18734).  A part of it: ATESD (arXiv:2605.11458), PAINT
(arXiv:2604.26573); the answer alone is a view of AVSD (arXiv:2605.20643).  Controls: another
problem's solution (arXiv:2608.09228), a wrong one (RLCSD, arXiv:2606.11709), nothing
(arXiv:2607.05184).  Plain Python, no torch.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_phf.config.settings import Config
from megatron_phf.config.teachers import teacher_names
from megatron_phf.data.problems import Problem, field_names, read_problems
from megatron_phf.data.tokenizer import Tokenizer

CLOSING = "Please reason step by step, and put your final answer within \\boxed{}."
SOLUTION_TEMPLATE = (
    "{problem}\n\nHere is a reference solution to this problem:\n{solution}\n\n"
    "Work through this solution until every step of it is clear to you. Then put it aside and "
    "solve the problem yourself: reach the same answer by your own reasoning and in your own "
    "words, without copying or rephrasing the text above.\n" + CLOSING
)
ANSWER_TEMPLATE = (
    "{problem}\n\nHere is the final answer to this problem:\n{solution}\n\n"
    "Keep it in mind, and solve the problem yourself: reach this answer by your own reasoning.\n"
    + CLOSING
)
HINT_TEMPLATE = (
    "{problem}\n\nHere is how a reference solution to this problem begins:\n{solution}\n\n"
    "Work through this beginning until every step of it is clear to you. Then put it aside and "
    "solve the problem yourself, by your own reasoning and in your own words, without copying or "
    "rephrasing the text above.\n" + CLOSING
)
_NUMBER = re.compile(r"[0-9]+")
_WORDING = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm))(?![A-Za-z])")


def _solutions(problems: Sequence[Problem], seed: int) -> list[str]:
    return [p.solution for p in problems]


def _answers(problems: Sequence[Problem], seed: int) -> list[str]:
    return [p.answer or "" for p in problems]


def _next_in_cycle(count: int, seed: int) -> list[int]:
    """A permutation of ``count`` numbers that is one cycle, so that none stays where it is."""
    order = list(range(count))
    random.Random(f"other problem {seed}").shuffle(order)
    following = [0] * count
    for here, there in zip(order, [*order[1:], *order[:1]], strict=True):
        following[here] = there
    return following


def _others(problems: Sequence[Problem], seed: int) -> list[str]:
    """For each problem the solution of another: a line that repeats it is no other problem."""
    lines: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        lines.setdefault(problem.problem, []).append(i)
    groups = list(lines.values())
    if len(groups) < 2:
        raise ValueError(
            "--privileged other_problem: --data has one problem alone; it takes two, or another "
            "--privileged"
        )
    texts = [""] * len(problems)
    for own, other in enumerate(_next_in_cycle(len(groups), seed)):
        for rank, i in enumerate(groups[own]):
            texts[i] = problems[groups[other][rank % len(groups[other])]].solution
    return texts


def _spelling(answer: str) -> str:
    """What two spellings of one word or letter have in common."""
    return re.sub(r"[\W_]", "", _WORDING.sub("", answer)).casefold()


def _wrong_answer(problem: Problem, answers: Sequence[str], generator: random.Random) -> str:
    """Another value: one digit of the answer's first number is another one, or another's answer."""
    assert problem.answer is not None
    number = _NUMBER.search(problem.answer)
    if number is not None:
        last = number.end() - 1
        digit = (int(problem.answer[last]) + generator.randrange(1, 10)) % 10
        return f"{problem.answer[:last]}{digit}{problem.answer[last + 1 :]}"
    start = generator.randrange(len(answers))
    for i in range(start, start + len(answers)):
        candidate = answers[i % len(answers)]
        if _spelling(candidate) != _spelling(problem.answer):
            return candidate
    raise ValueError(
        f"--privileged wrong: the answer {problem.answer!r} of problem {problem.index} has no "
        "number to alter, and no other problem another answer; take another --privileged"
    )


def _wrong(problems: Sequence[Problem], seed: int) -> list[str]:
    """The solution with a wrong answer wherever the right one stands; it ends with the wrong one.

    Where the solution spells its answer otherwise, a line with the wrong one is added.
    """
    answers = sorted({p.answer for p in problems if p.answer})
    texts = []
    for p in problems:
        assert p.answer is not None
        wrong = _wrong_answer(p, answers, random.Random(f"wrong {seed} {p.index}"))
        right = re.compile(rf"(?<![\w.]){re.escape(p.answer)}(?!\w|\.[0-9])")
        text = right.sub(lambda match: wrong, p.solution)  # noqa: B023  # called here
        last = max(text.rfind("\\boxed"), text.rfind("####"), 0)
        if text == p.solution or wrong not in text[last:]:
            text += f"\nThe final answer is \\boxed{{{wrong}}}."
        texts.append(text)
    return texts


@dataclass(frozen=True)
class Kind:
    """What one kind of privileged teacher is shown.

    ``texts``: of all problems and the run's seed, what stands for {solution} in each one's teacher
    prompt; None: the teacher is asked as the student is.  ``template``: around it, where the user
    gives none; ``fields``: of a problem that must be there.
    """

    says: str
    texts: Callable[[Sequence[Problem], int], list[str]] | None
    template: str = SOLUTION_TEMPLATE
    fields: tuple[str, ...] = ("solution",)


# The controls stand in the solution's own template: what differs is their content alone.
KINDS = {
    "solution": Kind("the reference solution", _solutions),
    "answer": Kind("the final answer alone", _answers, ANSWER_TEMPLATE, ("answer",)),
    "hint": Kind("the first part of the solution", _solutions, HINT_TEMPLATE),
    "other_problem": Kind("another problem's solution (a control)", _others),
    "wrong": Kind("a wrong solution (a control)", _wrong, fields=("solution", "answer")),
    "none": Kind(
        "what the student is shown (without another teacher: a loss of 0)", None, fields=()
    ),
}


@dataclass(frozen=True)
class Privileged:
    """A value of --privileged; of a hint the parts at the first and the last step, of 1."""

    name: str
    first: float = 1.0
    last: float = 1.0

    @property
    def kind(self) -> Kind:
        """Its row."""
        return KINDS[self.name]

    def fraction(self, iteration: int, train_iters: int) -> float:
        """The part of the solution that is shown in step ``iteration``, from 1: linear."""
        done = (iteration - 1) / max(train_iters - 1, 1)
        return self.first + (self.last - self.first) * done


def parse_privileged(text: str) -> Privileged:
    """``solution``, ..., ``hint:0.3`` or ``hint:0.2-1.0``.

    Raises:
        ValueError: there is no such kind, or no such part of a solution.
    """
    name, _, part = text.partition(":")
    if name not in KINDS or (name == "hint") != bool(part):
        raise ValueError(
            f"--privileged {text}: choose one of {', '.join(KINDS)}; hint as hint:0.3, or as "
            "hint:0.2-1, which changes over the run"
        )
    if not part:
        return Privileged(name)
    try:
        ends = [float(number) for number in part.split("-")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(0 < end <= 1 for end in ends):
        raise ValueError(f"--privileged {text}: the part of the solution must be above 0 to 1")
    return Privileged(name, ends[0], ends[-1])


class TeacherView:
    """Each problem as the teacher is shown it: another text stands in its solution's place."""

    def __init__(self, config: Config, problems: Sequence[Problem], tokenizer: Tokenizer) -> None:
        self._privileged = parse_privileged(config.data.privileged)
        texts, self._steps = self._privileged.kind.texts, config.train.train_iters
        self._shown = (
            _solutions(problems, 0) if texts is None else texts(problems, config.train.seed)
        )
        self._tokenizer = tokenizer
        self.changes = self._privileged.first != self._privileged.last

    def of(self, problem: Problem, iteration: int | None = None) -> Problem:
        """As it is shown in a step; None: where most of it is."""
        fraction = max(self._privileged.first, self._privileged.last)
        if iteration is not None:
            fraction = self._privileged.fraction(iteration, self._steps)
        text = _beginning(self._shown[problem.index], fraction, self._tokenizer)
        return dataclasses.replace(problem, solution=text)


def _beginning(text: str, fraction: float, tokenizer: Tokenizer) -> str:
    """The nearest whole number of the text's tokens to ``fraction`` of them, one at least."""
    if fraction == 1:
        return text
    ids = tokenizer.encode(text)
    part = tokenizer.decode(ids[: max(1, int(fraction * len(ids) + 0.5))], False)
    return part.rstrip("\ufffd")  # of a character in several tokens


def training_problems(config: Config) -> list[Problem]:
    """The problems of --data, with the fields that this run needs.

    Raises:
        ValueError: names the file and line of the first mistake.
    """
    assert config.data.data is not None
    fields = parse_privileged(config.data.privileged).kind.fields
    return read_problems(
        config.data.data,
        field_names(config.data),
        needs_solution="solution" in fields or config.rollout.rollout_engine == "reference",
        needs_answer="answer" in fields or config.rollout.keep_rollouts != "all",
        teachers=teacher_names(config),
    )


def check_privileged(config: Config, reads_data: bool) -> None:
    """Raise ValueError where --data cannot give what --privileged shows, or nothing reads it.

    ``reads_data``: whether rollouts start from --data's problems.
    """
    privileged = parse_privileged(config.data.privileged)
    reads = config.data.data is not None and reads_data
    if not reads and privileged != Privileged("solution"):
        raise ValueError(
            f"--privileged {config.data.privileged} needs --hf-model and --data: the embedded "
            "task's teacher is shown solutions (tools/make_embedded.py writes that task as files), "
            "a replay file's what was recorded"
        )
    if reads:
        problems = training_problems(config)
        if privileged.kind.texts is not None:
            privileged.kind.texts(problems, config.train.seed)
