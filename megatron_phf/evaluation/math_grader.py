"""Are two answers the same value?  By math-verify, within a process of :mod:`grader_process`.

math-verify parses LaTeX and compares with sympy, which may think forever, fill the memory, or end
the interpreter on a model's output: nothing else imports this module.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Float, Integer, Interval, MatrixBase, N

from megatron_phf.data.problems import Problem
from megatron_phf.evaluation.reading import read, same
from megatron_phf.evaluation.spelling import readable

logging.getLogger("math_verify").setLevel(logging.ERROR)  # "timeout is disabled": it is ours


# As LaTeX alone: math-verify reads plain expressions with sympy's parse_expr, which is an eval.
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0),)


# Both write x \approx 3 as x = 3, degrees with \circ, and 1e-5 as a power of ten.
_APPROXIMATELY = re.compile(r"\u2248|\\(?:approx|simeq|doteq|cong)(?![A-Za-z])")
_DEGREES = re.compile(r"\\(?:text)?degree(?![A-Za-z])|[\u00b0\u00ba]")
_EXPONENT = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.])")
# math-verify rounds floats to 6 decimals: of small numbers that leaves nothing.  A decimal is
# near; two closed forms are equal.
_RELATIVE, _EXACT = Float("1e-5", 50), Float("1e-30", 50)


def _parsed(answer: str) -> list[Any]:
    # An answer is given as it stood in its box; references often stand between dollar signs.
    text = _APPROXIMATELY.sub("=", readable(answer))
    text = _EXPONENT.sub(r"\1\\times 10^{\2}", _DEGREES.sub(r"^{\\circ}", text))
    return list(parse(f"\\boxed{{{text}}}", _EXTRACTION, parsing_timeout=None))


def _far_apart(one: Any, other: Any) -> bool:
    """Whether math-verify's rounding alone makes both equal: their numbers differ, at any size."""
    if isinstance(one, (Interval, MatrixBase)) and isinstance(other, type(one)):
        parts = ((x.start, x.end) if isinstance(x, Interval) else tuple(x) for x in (one, other))
        return any(_far_apart(x, y) for x, y in zip(*parts, strict=False))
    symbols = getattr(one, "free_symbols", set()) | getattr(other, "free_symbols", set())
    try:  # at one point: two expressions in x are equal at any
        point = {s: Integer(7 + i) / 5 for i, s in enumerate(sorted(symbols, key=str))}
        exact = not (one.has(Float) or other.has(Float))
        a, b = (x.subs(point).doit() for x in (one, other))
        if not (a.is_number and b.is_number):
            return False
        a, b = N(a, 50), N(b, 50)
        near = _EXACT if exact else _RELATIVE
        # Also its hundredfold: a percentage.
        pairs = ((a, b), (100 * a, b), (a, 100 * b))
        return all(bool(abs(x - y) > near * max(abs(x), abs(y))) for x, y in pairs)
    except (AttributeError, TypeError, ValueError, OverflowError):  # sets, relations, infinities
        return False


def same_value(answer: str, problem: Problem) -> bool:
    """Whether ``answer`` (extracted) has the value of the problem's, member by member of a list."""
    assert problem.answer is not None
    return same(read(answer), read(problem.answer), _verified) is True


def _verified(answer: str, wanted: str) -> bool:
    gold, parsed = _parsed(wanted), _parsed(answer)
    if not verify(gold, parsed, timeout_seconds=None):
        return False
    return not (gold and parsed and _far_apart(gold[0], parsed[0]))
