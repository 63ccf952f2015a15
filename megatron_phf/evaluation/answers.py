r"""Final answers: where a text has one, and whether two are the same text, number or list.

Numbers are exact: ``1e-5``, ``1{,}024``, ``0.1\overline{6}``, ``\frac{1}{2}``, ``30^\circ`` and the
like are rationals, and two of them are compared as such.  What is beyond that (roots, symbols,
sets) is for math-verify.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 2000  # characters; what is longer is no answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# \boxed 5, without braces: a number, a point, or a letter that stands alone.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*"
    r"([-+\u2212\u2013]?\.?\d[^\s{}$\\]*|\([^(){}$\\\n]*\)|[A-Z](?![A-Za-z]))"
)
_MARKED = re.compile(r"^####\s*(.+)$", re.MULTILINE)

_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt)|boldsymbol|bm|mbox|emph)"
    r"\s*\{([^{}]*)\}"
)
_STYLE = re.compile(
    r"\\(?:bf|rm|it|sf|bfseries|displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*"
)
_SPACE = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:q?quad|(?:thin|med|thick|en)space|nobreakspace)(?![A-Za-z])|~|\s"
)
# A dash where only a sign can stand; between two numbers it is a range.
_SIGN = re.compile(
    r"(^|[(\[{,=^_<>]|\\(?:approx|times|cdot)(?![A-Za-z]))(\s*)[\u2010-\u2015](?=\s*[\w.\\(])"
)
_RELATION = re.compile(r"(?:=|\u2248|\\(?:approx|simeq|sim|cong|doteq)(?![A-Za-z]))\s*")
_DEGREES = re.compile(
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\(?:text)?degree(?![A-Za-z])|[\u00b0\u00ba]|(?<=\d)\s*degrees?\b)"
)
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# Groups of three digits between commas that are no list: nothing of one stands around them.
_THOUSANDS = re.compile(r"(?<![\w.,([{])(\d{1,3}(?:,\d{3})+)(?![\d,)\]}]|\\})")
_GROUP = r"(?<=\d)(?:{})(?=\d{{3}}(?!\d))"
_SURE_GROUP = re.compile(_GROUP.format(r"\{,\}|,?\\!"))
_SPACED_GROUP = re.compile(_GROUP.format(" "))

_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL.pattern})\s*(?:[eE]|(?:\\times|\\cdot|[\u00d7\u22c5\u00b7*])\s*10\s*\^\s*)"
    r"\{?\s*([-+]?\d{1,4})\s*\}?"
)
_POWER = re.compile(r"([-+]?)10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?")
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_PART = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_FRACTION = re.compile(rf"([-+]?)(\d*)\s*\\frac{_PART}{_PART}")
_SLASH = re.compile(rf"({_DECIMAL.pattern}) */ *({_DECIMAL.pattern})")
_MIXED = re.compile(r"([-+]?)(\d+) +(\d+)/(\d+)")


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


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box begins and ends; an empty one only where no other is."""
    starts = {match.end() for match in _BOX.finditer(text)}
    found: tuple[int, int] | None = None
    opened: list[int] = []  # where the text within each open brace begins
    for brace in re.finditer("[{}]", text) if starts else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts:
            box = start, brace.start()
            found = max(found or box, box, key=lambda b: (b[1] > b[0], b[0]))
    return found


def readable(text: str) -> str:
    """``text`` with what people and models write around and in mathematics made LaTeX's own."""
    text = text.strip().replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    text = _SURE_GROUP.sub("", _STYLE.sub("", text)).replace("\\!", "").replace("{,}", ",")
    text = re.sub("[\u2212\ufe63\uff0d]", "-", text)
    text = _SPACE.sub(" ", _SIGN.sub(r"\1\2-", text)).strip()
    text = _SPACED_GROUP.sub("", re.sub(" +", " ", text))
    if match := _RELATION.match(text):
        text = text[match.end() :]
    return re.sub(r"^([-+]) ", r"\1", text)


def _spelled(text: str) -> str:
    """``text`` in one spelling, but for commas: groups of thousands, or a list."""
    box = _BOX.match(text.strip())
    if box is not None and text.strip().endswith("}"):
        text = text.strip()[box.end() : -1]
    text = readable(text)
    while (plainer := _WRAPPER.sub(r"\1", text)) != text:
        text = plainer
    text = _DEGREES.sub("\u00b0", text).replace("\\%", "%")
    text = _SHORT_FRACTION.sub(_whole_fraction, text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = text.replace("\u2044", "/").strip()
    text = re.sub(r"(?<!\.)\.$", "", text).strip()
    if text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    return text.removeprefix("+").lstrip()


def _without_thousands(text: str) -> str:
    return _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)


def normalize_answer(text: str) -> str:
    r"""``text`` in one spelling: without $, ``\text{}``, bold, thousands commas, a final dot."""
    return _without_thousands(_spelled(text))


def _whole_fraction(match: re.Match[str]) -> str:
    parts = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups())
    return "\\frac" + "".join(parts)


def _rational(text: str, depth: int = 3) -> Fraction | None:
    """The number that normalised ``text`` without a unit is; None if it is none."""
    text = text.strip()
    if depth and text.startswith("(") and text.endswith(")"):
        return _rational(text[1:-1], depth - 1)
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := _POWER.fullmatch(text):
        return Fraction(match[1] + "1") * Fraction(10) ** int(match[2])
    if match := _REPEATING.fullmatch(text):
        return _repeating(match)
    return _quotient(text, depth)


def _repeating(match: re.Match[str]) -> Fraction:
    sign, whole, head, tail = match[1], match[2] or "0", match[3], match[4] or match[5]
    value = Fraction(f"{whole}.{head}0") + Fraction(
        int(tail), (10 ** len(tail) - 1) * 10 ** len(head)
    )
    return -value if sign == "-" else value


def _quotient(text: str, depth: int) -> Fraction | None:
    if match := _SLASH.fullmatch(text):
        parts = Fraction(match[1]), Fraction(match[2])
        return parts[0] / parts[1] if parts[1] else None
    sign = whole = top = bottom = None
    if match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = match[1], match[2], Fraction(match[3]), Fraction(match[4])
        if top >= bottom:
            return None
    elif depth and (match := _FRACTION.fullmatch(text)):
        sign, whole = match[1], match[2]
        top, bottom = _rational(match[3], depth - 1), _rational(match[4], depth - 1)
    if top is None or not bottom or (whole and not 0 < top < bottom):
        return None
    value = int(whole or 0) + top / bottom
    return -value if sign == "-" else value


@dataclass(frozen=True)
class _Reading:
    """What an answer may mean: a number and its unit, a list of numbers and its brackets, or both.

    ``100,200,300`` is both; ``(1,234)`` is a pair.
    """

    text: str
    number: Fraction | None
    unit: str
    items: tuple[Fraction, ...]
    brackets: str


def _read(raw: str) -> _Reading:
    spelled = _spelled(raw)
    text = _without_thousands(spelled)
    if len(text) > MAX_ANSWER // 2:  # no number that a task asks for
        return _Reading(text, None, "", (), "")
    unit = text[-1:] if text[-1:] in ("%", "\u00b0") else ""
    return _Reading(text, _rational(text[: len(text) - len(unit)]), unit, *_list(spelled))


def _list(text: str) -> tuple[tuple[Fraction, ...], str]:
    """Two numbers or more between commas, and the brackets around them."""
    match = re.fullmatch(r"(\\\{|[(\[]?)(.*?)(\\\}|[)\]]?)", text, re.DOTALL)
    assert match is not None
    numbers = [_rational(part) for part in match[2].split(",")]
    items = tuple(number for number in numbers if number is not None)
    return (items, match[1] + match[3]) if len(items) == len(numbers) > 1 else ((), "")


def _equal_numbers(ours: _Reading, wanted: _Reading) -> bool:
    assert ours.number is not None and wanted.number is not None
    if ours.unit == wanted.unit or not (ours.unit and wanted.unit):
        if ours.number == wanted.number:
            return True
        if "%" in (ours.unit, wanted.unit) and ours.unit != wanted.unit:
            values = (r.number / (100 if r.unit else 1) for r in (ours, wanted))  # type: ignore[operator]
            return len(set(values)) == 1
    return False


def _equal_lists(ours: _Reading, wanted: _Reading) -> bool | None:
    if ours.items == wanted.items and ours.brackets == wanted.brackets:
        return True
    # Sets have no order, and (1,2) may be meant by 1,2; other members are never the same.
    return None if set(ours.items) == set(wanted.items) else False


def same_answer(found: str, answer: str) -> bool | None:
    """Whether both are the same text, number or list of numbers; None: more has to be known."""
    ours, wanted = _read(found), _read(answer)
    if _compact(ours.text) == _compact(wanted.text):
        return True
    if ours.number is not None and wanted.number is not None and _equal_numbers(ours, wanted):
        return True
    if ours.items and wanted.items:
        return _equal_lists(ours, wanted)
    known = [reading.number is not None or bool(reading.items) for reading in (ours, wanted)]
    return False if all(known) else None


def _compact(text: str) -> str:
    """Without spaces that separate no two numbers or words."""
    return re.sub(r" ?([^\w .]) ?", r"\1", text)


def canonical_answer(generation: str) -> str | None:
    """The final answer in one spelling, for majority votes; None where there is none.

    Numbers as ``3`` or ``1/2``, everything else as ``normalize_answer`` leaves it.
    """
    found = extract_answer(generation)
    if found is None or len(found) > MAX_ANSWER:
        return None
    reading = _read(found)
    return _compact(reading.text) if reading.number is None else str(reading.number)


def is_correct(generation: str, answer: str) -> bool:
    """Whether the final answer equals ``answer``, as text, as a number, or as a list of them."""
    found = extract_answer(generation)
    if found is None or len(found) > MAX_ANSWER:
        return False
    return same_answer(found, answer) is True
