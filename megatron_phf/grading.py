"""Grading of final answers, and Average@k with its interval."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_BOXED = "\\boxed{"
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_MARKED = re.compile(r"^####\s*(.+)$", re.MULTILINE)


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
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text).strip().rstrip(".").strip()
    if text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    return text.removeprefix("+")


def _number(text: str) -> Fraction | None:
    text = _FRACTION.sub(r"\1/\2", text).replace(" ", "").removesuffix("%")
    try:
        # Longer numbers take time without limit, and no answer is one.
        return Fraction(text) if len(text) <= 64 and "e" not in text.lower() else None
    except (ValueError, ZeroDivisionError):
        return None


def is_correct(generation: str, answer: str) -> bool:
    """Whether the generation's final answer equals ``answer``, as text or as a number."""
    found = extract_answer(generation)
    if found is None:
        return False
    ours, wanted = normalize_answer(found), normalize_answer(answer)
    number = _number(ours)
    return ours == wanted or (number is not None and number == _number(wanted))


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
