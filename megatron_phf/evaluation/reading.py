r"""What an answer says, and whether two say the same: numbers, lists, ratios, times, intervals.

Every rule is in docs/evaluation.md.  What is beyond them is asked of the caller: see ``same``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_phf.evaluation.rationals import rational
from megatron_phf.evaluation.spelling import spelled, without_thousands
from megatron_phf.evaluation.units import split_unit

MAX_ANSWER = 2000  # characters; what is longer is no answer

_SIGN = r"(<=|>=|<|>|\\[lg]t(?![A-Za-z])|\\[lg]e(?:q(?:slant)?)?(?![A-Za-z]))"
_CHAIN = re.compile(rf"([^<>]+?) ?{_SIGN} ?([A-Za-z]) ?{_SIGN} ?([^<>]+)")
_BOUNDED = re.compile(rf"([A-Za-z]) ?{_SIGN} ?(?![A-Za-z]$)([^<>]+)")
_CHOICE = re.compile(
    r"\(?([A-J])(?:\)|(?<!\()[.:]) *((?<= )[-\w\\(.].*|\d.*|\\(?:[dt]?frac|sqrt|pi|\{).*|)",
    re.DOTALL,
)
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?: ?([ap])\.?m\.?)?", re.IGNORECASE)
_SEPARATOR = re.compile(r"\\[{}]|[(\[{)\]}]|,? ?\b(?:and|or)\b|\\l(?:or|and)(?![A-Za-z])|[,;]")
_SETS = ("", r"\{\}")


@dataclass(frozen=True)
class Reading:
    """What an answer may mean: ``100,200,300`` is a number and a list; ``(1,234)`` is a pair."""

    raw: str
    text: str
    number: Fraction | None = None
    unit: str = ""
    items: tuple[Reading, ...] = ()
    brackets: str = ""
    variable: str = ""
    choice: str = ""

    @property
    def known(self) -> bool:
        """Whether this is numbers alone, so that nobody else has to be asked."""
        return self.number is not None or (bool(self.items) and all(i.known for i in self.items))


def read(raw: str, depth: int = 3) -> Reading:
    """Read an answer: a list's members are readings too."""
    text = spelled(raw)
    plain = without_thousands(text)
    if len(text) > MAX_ANSWER // 2 or not depth:  # no number that a task asks for
        return Reading(raw, plain)
    if (match := _CHOICE.fullmatch(text)) and match[2]:
        return Reading(match[2], without_thousands(spelled(match[2])), choice=match[1])
    body, unit = split_unit(plain)
    parts, brackets, variable = _interval(text) or (*_members(text), "")
    items = tuple(read(part, depth - 1) for part in parts) if len(parts) > 1 else ()
    return Reading(raw, plain, rational(body), unit, items, brackets, variable)


def _interval(text: str) -> tuple[list[str], str, str] | None:
    r"""``1 < x \le 2`` as ``(1, 2]``, ``x > 3`` as ``(3, \infty)``."""
    if match := _CHAIN.fullmatch(text):
        low, first, variable, second, high = match.groups()
        if _upwards(first) != _upwards(second):
            return None
        if not _upwards(first):
            low, first, second, high = high, second, first, low
    elif match := _BOUNDED.fullmatch(text):
        variable, sign, bound = match.groups()
        low, first, second, high = r"-\infty", "<", sign, bound
        if not _upwards(sign):
            low, first, second, high = bound, sign, "<", r"\infty"
    else:
        return None
    return (
        [low, high],
        ("[" if "e" in first or "=" in first else "(")
        + ("]" if "e" in second or "=" in second else ")"),
        variable,
    )


def _upwards(sign: str) -> bool:
    return sign.startswith(("<", r"\l"))


def _members(text: str) -> tuple[list[str], str]:
    r"""The members of a list and its brackets; ``\pm 2`` is two members."""
    cuts: list[int] = []
    depth, start, outer = 0, 0, True
    for match in _SEPARATOR.finditer(text):
        if match[0][-1] in "([{":
            depth += 1
        elif match[0][-1] in ")]}":
            depth -= 1
            outer = outer and (depth > 0 or match.end() == len(text))
        elif depth == 0:
            cuts += match.span()
    opening = re.match(r"\\\{|[(\[]", text)
    closing = re.search(r"(\\\}|[)\]])$", text)
    if opening and closing and outer and depth == 0 and not cuts:
        inner = text[opening.end() : closing.start()].strip()
        parts, brackets = _members(inner)
        own = opening[0] + closing[0]
        return (parts, own) if not brackets and (own in _SETS or r"\pm" not in inner) else ([], "")
    bounds = [start, *cuts, len(text)]
    parts = [text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    parts = [part for part in parts if part] if cuts else parts
    return [sign for part in parts for sign in _both_signs(part)], ""


def _both_signs(part: str) -> list[str]:
    pieces = re.split(r"\\pm(?![A-Za-z]) ?", part)
    return [sign.join(pieces).strip() for sign in "+-"] if len(pieces) == 2 else [part]


def compact(text: str) -> str:
    """Without spaces that separate no two numbers or words."""
    return re.sub(r" ?([^\w .]) ?", r"\1", text)


Value = Callable[[str, str], bool | None]


def same(ours: Reading, wanted: Reading, value: Value) -> bool | None:
    """Whether both say the same; of what is no number, ``value`` is asked, and may not know."""
    if ours.choice or wanted.choice:
        return _same_choice(ours, wanted, value)
    if compact(ours.text) == compact(wanted.text):
        return True
    if (verdict := _same_colons(ours, wanted)) is not None:
        return verdict
    if ours.number is not None and wanted.number is not None and _same_numbers(ours, wanted):
        return True
    if ours.unit and wanted.unit and ours.unit != wanted.unit:
        return False
    if ours.items and wanted.items:
        return _same_items(ours, wanted, value)
    return False if ours.known and wanted.known else value(ours.raw, wanted.raw)


def _same_choice(ours: Reading, wanted: Reading, value: Value) -> bool | None:
    """``(B) 25`` is ``B`` and is 25; two choices have one letter and one value."""
    if ours.choice and wanted.choice and ours.choice != wanted.choice:
        return False
    for one, other in ((ours, wanted), (wanted, ours)):
        letter = re.fullmatch(r"\(?([A-J])\)?", other.text)
        if one.choice and letter and not other.choice:
            return one.choice == letter[1]
    return same(read(ours.raw), read(wanted.raw), value)


def _same_colons(ours: Reading, wanted: Reading) -> bool | None:
    """Times as times where both may be times, else ratios in proportion; None: there is no such."""
    times = [_TIME.fullmatch(reading.text) for reading in (ours, wanted)]
    if times[0] and times[1]:
        one, other = ((int(t[1]), t[2], (t[3] or "").lower()) for t in times if t)
        if (one[2] and other[2]) or not (one[2] or other[2]):
            return one == other
        hours = {h % 12 + 12 * (half == "p") if half else h for h, _, half in (one, other)}
        return one[1] == other[1] and (len(hours) == 1 or one[0] == other[0])
    ratios = [_ratio(reading.text) for reading in (ours, wanted)]
    if ratios[0] and ratios[1]:
        return ratios[0] == ratios[1]
    for ratio, reading in ((ratios[0], wanted), (ratios[1], ours)):
        if ratio and reading.number is not None:
            return len(ratio) == 2 and ratio[0] == reading.number * ratio[1]
    return None


def _ratio(text: str) -> list[Fraction] | None:
    numbers = [rational(part) for part in re.split(r" ?(?::|\\colon) ?", text)]
    parts = [number for number in numbers if number]
    return [p / parts[-1] for p in parts] if len(parts) == len(numbers) > 1 else None


def _same_numbers(ours: Reading, wanted: Reading) -> bool:
    assert ours.number is not None and wanted.number is not None
    if ours.unit and wanted.unit and ours.unit != wanted.unit:
        return False
    if "%" in (ours.unit, wanted.unit) and ours.unit != wanted.unit:
        percent, other = (ours, wanted) if ours.unit else (wanted, ours)
        assert percent.number is not None
        return other.number in (percent.number, percent.number / 100)
    return ours.number == wanted.number


def _same_items(ours: Reading, wanted: Reading, value: Value) -> bool | None:
    """Bare lists and sets have no order, brackets have one; what stands twice counts twice."""
    if len(ours.items) != len(wanted.items):
        return False
    if ours.variable and wanted.variable and ours.variable != wanted.variable:
        return False
    brackets = {ours.brackets, wanted.brackets}
    unordered = brackets <= set(_SETS)
    # (1,234) is a pair and 1,234 a number; (1,2) may be meant by 1,2.
    bare = [r for r in (ours, wanted) if not r.brackets and r.number is None]
    if not unordered and len(brackets) > 1 and not (bare and brackets & {"()", "[]"}):
        return False
    doubt = False
    left = list(wanted.items)
    for item in ours.items:
        verdicts: list[bool | None] = []
        for other in left if unordered else left[:1]:
            verdicts.append(same(item, other, value))
            if verdicts[-1]:
                break
        if not any(verdict is not False for verdict in verdicts):
            return None if doubt else False
        doubt |= not verdicts[-1]
        left.pop(len(verdicts) - 1 if verdicts[-1] else verdicts.index(None))
    return None if doubt else True
