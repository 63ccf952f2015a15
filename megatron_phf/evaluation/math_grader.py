"""Are two answers the same value?  By math-verify, within a process of :mod:`grader_process`.

math-verify parses LaTeX and compares with sympy, which may think forever, fill the memory, or end
the interpreter on a model's output: nothing else imports this module.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import N

from megatron_phf.data.problems import Problem
from megatron_phf.evaluation.answers import readable

logging.getLogger("math_verify").setLevel(logging.ERROR)  # "timeout is disabled": it is ours


# As LaTeX alone: math-verify reads plain expressions with sympy's parse_expr, which is an eval.
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0),)


# Both write x \approx 3 as x = 3, degrees with \circ, and 1e-5 as a power of ten.
_APPROXIMATELY = re.compile(r"\u2248|\\(?:approx|simeq|doteq|cong)(?![A-Za-z])")
_DEGREES = re.compile(r"\\(?:text)?degree(?![A-Za-z])|[\u00b0\u00ba]")
_EXPONENT = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.])")
# math-verify rounds floats to 6 decimals: of small numbers that leaves nothing.
_RELATIVE = 1e-5


def _parsed(answer: str) -> list[Any]:
    # An answer is given as it stood in its box; references often stand between dollar signs.
    text = _APPROXIMATELY.sub("=", readable(answer))
    text = _EXPONENT.sub(r"\1\\times 10^{\2}", _DEGREES.sub(r"^{\\circ}", text))
    return list(parse(f"\\boxed{{{text}}}", _EXTRACTION, parsing_timeout=None))


def _far_apart(one: Any, other: Any) -> bool:
    """Whether both are numbers, and neither near the other nor near its hundredfold (percent)."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    try:
        a, b = complex(N(one.doit())), complex(N(other.doit()))
        pairs = ((a, b), (100 * a, b), (a, 100 * b))
        return all(abs(x - y) > _RELATIVE * max(abs(x), abs(y)) for x, y in pairs)
    except (TypeError, ValueError, OverflowError):  # beyond floats
        return False


def same_value(answer: str, problem: Problem) -> bool:
    """Whether ``answer`` (extracted) has the value of the problem's."""
    assert problem.answer is not None
    gold, found = _parsed(problem.answer), _parsed(answer)
    if not verify(gold, found, timeout_seconds=None):
        return False
    return not (gold and found and _far_apart(gold[0], found[0]))
