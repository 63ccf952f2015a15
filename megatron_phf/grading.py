"""Grading of final answers, and Average@k with its interval.  No torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from megatron_phf.data.problems import Problem
from megatron_phf.grader_process import GraderProcess, check_grader

_BOXED = "\\boxed{"
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_MARKED = re.compile(r"^####\s*(.+)$", re.MULTILINE)
_MAX_ANSWER = 2000  # characters; what is longer is no answer
_MATH = "megatron_phf.math_grader:same_value"


def extract_answer(text: str) -> str | None:
    r"""The last ``\boxed{...}`` (balanced braces), else the last ``#### ...`` line, else None."""
    starts = {match.end() for match in re.finditer(re.escape(_BOXED), text)}
    found: tuple[int, int] | None = None
    opened: list[int] = []  # where the text within each open brace begins
    for brace in re.finditer("[{}]", text) if starts else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts:
            found = max(found or (start, 0), (start, brace.start()))
    if found is not None:
        return text[slice(*found)].strip()
    marked = _MARKED.findall(text)
    return marked[-1].strip() if marked else None


def normalize_answer(text: str) -> str:
    """Strip what does not change an answer: spaces, $, \\text{}, thousands commas, a final dot."""
    text = _TEXT.sub(r"\1", text).replace("$", "").replace("\\!", "").replace("\\,", "")
    text = text.replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text).strip().rstrip(".").strip()
    if text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    return text.removeprefix("+")


def _number(text: str) -> Fraction | None:
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    # Spaces group thousands or surround a slash; "1 1/2" is not 11/2.
    text = re.sub(r"(?<=\d) (?=\d{3}(\D|$))| *(?=/)|(?<=/) *", "", text).removesuffix("%")
    try:
        # Longer numbers take time without limit, and no answer is one.
        return Fraction(text) if len(text) <= 64 and "e" not in text.lower() else None
    except (ValueError, ZeroDivisionError):
        return None


def _same(found: str, answer: str) -> bool:
    ours, wanted = normalize_answer(found), normalize_answer(answer)
    number = _number(ours)
    return ours == wanted or (number is not None and number == _number(wanted))


def is_correct(generation: str, answer: str) -> bool:
    """Whether the generation's final answer equals ``answer``, as text or as a number."""
    found = extract_answer(generation)
    return found is not None and _same(found, answer)


def canonical_answer(generation: str) -> str | None:
    """The final answer in one spelling, for majority votes; None where there is none.

    Numbers as ``3`` or ``1/2``, everything else as ``normalize_answer`` leaves it.
    """
    found = extract_answer(generation)
    if found is None or len(found) > _MAX_ANSWER:
        return None
    text = normalize_answer(found)
    number = _number(text)
    return text if number is None else str(number)


class Grader(Protocol):
    """Decides whether a generation answers a problem."""

    def correct(self, generation: str, problem: Problem) -> bool:
        """The verdict; never raises, whatever a model wrote."""


class _ExactGrader:
    def correct(self, generation: str, problem: Problem) -> bool:
        assert problem.answer is not None, "evaluation sets have answers"
        return is_correct(generation, problem.answer)


class _MathGrader:
    """Equal as text or number, else by math-verify; its verdicts are remembered."""

    def __init__(self, process: GraderProcess) -> None:
        self._process = process
        self._known: dict[tuple[str, str], bool] = {}

    def correct(self, generation: str, problem: Problem) -> bool:
        answer, found = problem.answer, extract_answer(generation)
        assert answer is not None, "evaluation sets have answers"
        if not found or len(found) > _MAX_ANSWER:
            return False
        if _same(found, answer):
            return True
        key = found, answer
        if key not in self._known:  # samples repeat each other, also those that take long
            self._known[key] = self._process.correct(found, problem)
        return self._known[key]


@contextlib.contextmanager
def make_grader(spec: str = "math", timeout: float = 10.0) -> Iterator[Grader]:
    """The grader ``spec`` names: ``math``, ``exact`` or ``package.module:function``.

    A function ``f(generation: str, problem: Problem) -> bool`` is imported from where Python finds
    it, in a process of its own; so is math-verify, once an answer needs it.

    Args:
        timeout: seconds an answer may take in that process; longer, and it is wrong.

    Raises:
        ValueError: no such grader, or its module cannot be imported.
    """
    check_grader(spec)
    if spec == "exact":
        yield _ExactGrader()
        return
    process = GraderProcess(_MATH if spec == "math" else spec, timeout)
    try:
        if spec != "math":
            _start(process, spec)
        yield _MathGrader(process) if spec == "math" else process
    finally:
        process.close()


def _start(process: GraderProcess, spec: str) -> None:
    try:
        process.start()
    except ValueError as error:
        raise ValueError(
            f"--grader {spec}: cannot be loaded ({error}); is its folder on PYTHONPATH?"
        ) from error


def average_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """correct [problems][k] -> mean over problems of the mean over samples."""
    return sum(sum(row) / len(row) for row in correct) / len(correct)


def bootstrap_interval(
    per_problem: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling problems."""
    values = np.asarray(per_problem, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values[draws].mean(1), [tail, 100 - tail])
    return float(low), float(high)
