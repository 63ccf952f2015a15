r"""Final answers: where a text has one, and whether two are the same text, number or list.

What is beyond that (roots, symbols, unions) is for math-verify.
"""

from __future__ import annotations

import re

from megatron_phf.evaluation.reading import MAX_ANSWER, Reading, compact, read, same
from megatron_phf.evaluation.spelling import BOX

# \boxed 5, without braces: a number, a point, or a letter that stands alone.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*"
    r"([-+\u2212\u2013]?\.?\d[^\s{}$\\]*|\([^(){}$\\\n]*\)|[A-Z](?![A-Za-z]))"
)
_MARKED = re.compile(r"^####\s*(.+)$", re.MULTILINE)

_BLANK = re.compile(
    r"(?:\s|~|\$|[{}]|\\[,;:! ()]|\\q?quad|\\(?:boxed|fbox|text|math)(?:bf|it|rm)?(?![A-Za-z]))*"
)


def extract_answer(text: str) -> str | None:
    r"""The last ``\boxed{...}`` or ``\boxed 5`` that is not empty, else the last ``#### ...`` line.

    Braces are balanced, ``\fbox`` is a box; None where there is nothing.
    """
    found = _last_box(text)
    bare = None
    for bare in _BARE_BOX.finditer(text):  # noqa: B007  # the last one
        pass
    if bare is not None and (found is None or bare.start() > found[0]):
        content = bare[1].rstrip(".,;:!?")
        return content if "(" in content else content.rstrip(")")
    if found is not None:
        return text[slice(*found)].strip()
    marked = _MARKED.findall(text)
    return marked[-1].strip() if marked else None


def _is_blank(text: str, start: int, end: int) -> bool:
    return end - start < 100 and _BLANK.fullmatch(text, start, end) is not None


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box begins and ends; an empty one only where no other is."""
    starts = {match.end() for match in BOX.finditer(text)}
    found: tuple[int, int] | None = None
    opened: list[int] = []  # where the text within each open brace begins
    # \\{ is no brace of LaTeX's own: \\left\\{ needs no mate.
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL) if starts else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened and (start := opened.pop()) in starts:
            box = start, brace.start()
            found = max(found or box, box, key=lambda b: (not _is_blank(text, *b), b[0]))
    return found


def same_answer(found: str, answer: str) -> bool | None:
    """Whether both are the same text, number or list of them; None: more has to be known."""
    return same(read(found), read(answer), lambda one, other: None)


def canonical_answer(generation: str) -> str | None:
    """The final answer in one spelling, for majority votes; None where there is none.

    Numbers as ``3`` or ``1/2``, lists with such members, everything else in one spelling.
    """
    answer = extract_answer(generation)
    if answer is None or len(answer) > MAX_ANSWER:
        return None
    return _canonical(read(answer))


def _canonical(reading: Reading) -> str:
    if reading.choice:
        return f"({reading.choice}) {_canonical(read(reading.raw))}"
    number = reading.number
    # Python writes no number of more than 4300 digits.
    if number is None or max(map(int.bit_length, number.as_integer_ratio())) > 14000:
        return compact(reading.text)
    return str(number)


def is_correct(generation: str, answer: str) -> bool:
    """Whether the final answer equals ``answer``, as text, as a number, or as a list of them."""
    found = extract_answer(generation)
    if found is None or len(found) > MAX_ANSWER:
        return False
    return same_answer(found, answer) is True
