"""Are two answers the same value?  By math-verify, within a process of :mod:`grader_process`.

math-verify parses LaTeX and compares with sympy, which may think forever, fill the memory, or end
the interpreter on a model's output: nothing else imports this module.
"""

from __future__ import annotations

import logging

from math_verify import LatexExtractionConfig, parse, verify

from megatron_phf.data.problems import Problem

logging.getLogger("math_verify").setLevel(logging.ERROR)  # "timeout is disabled": it is ours


# As LaTeX alone: math-verify reads plain expressions with sympy's parse_expr, which is an eval.
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0),)


def _parsed(answer: str) -> list[object]:
    # An answer is given as it stood in its box; references often stand between dollar signs.
    text = answer.strip().strip("$").strip()
    return list(parse(f"\\boxed{{{text}}}", _EXTRACTION, parsing_timeout=None))


def same_value(answer: str, problem: Problem) -> bool:
    """Whether ``answer`` (extracted) has the value of the problem's."""
    assert problem.answer is not None
    return bool(verify(_parsed(problem.answer), _parsed(answer), timeout_seconds=None))
