"""Grading of final answers, and Average@k with its interval.  No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from megatron_phf.data.problems import Problem
from megatron_phf.evaluation.answers import (
    MAX_ANSWER,
    canonical_answer,
    extract_answer,
    is_correct,
    same_answer,
)
from megatron_phf.evaluation.grader_process import GraderProcess, check_grader

__all__ = [
    "Grader",
    "average_at_k",
    "bootstrap_interval",
    "canonical_answer",
    "check_grader",
    "extract_answer",
    "is_correct",
    "make_grader",
]
_MATH = "megatron_phf.evaluation.math_grader:same_value"


class Grader(Protocol):
    """Decides whether a generation answers a problem."""

    def correct(self, generation: str, problem: Problem) -> bool:
        """The verdict; never raises, whatever a model wrote."""


class _ExactGrader:
    def correct(self, generation: str, problem: Problem) -> bool:
        assert problem.answer is not None, "evaluation sets have answers"
        return is_correct(generation, problem.answer)


class _MathGrader:
    """By text, numbers and lists of numbers, else by math-verify; its verdicts are remembered."""

    def __init__(self, process: GraderProcess) -> None:
        self._process = process
        self._known: dict[tuple[str, str], bool] = {}

    def correct(self, generation: str, problem: Problem) -> bool:
        answer, found = problem.answer, extract_answer(generation)
        assert answer is not None, "evaluation sets have answers"
        if not found or len(found) > MAX_ANSWER:
            return False
        same = same_answer(found, answer)
        if same is not None:
            return same
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
