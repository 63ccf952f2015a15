r"""Answers in one spelling: LaTeX's and Unicode's dress off, mixed numbers as fractions."""

from __future__ import annotations

import re
import unicodedata

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt)|boldsymbol|bm|mbox|emph)"
    r"\s*\{([^{}]*)\}"
)
_STYLE = re.compile(
    r"\\(?:bf|rm|it|sf|bfseries|displaystyle|textstyle|left\s*\.|right\s*\.|left|right|[bB]igg?[lr]?"
    r"|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|underline|uline|ensuremath"
    r"|(?:text|page)?color(?:box)?\s*\{[^{}]*\})(?![A-Za-z])\s*"
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
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = str.maketrans(_SUPERSCRIPTS, "0123456789-")
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))")
_SYMBOLS = str.maketrans(
    {
        "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u2264": r"\le ", "\u2265": r"\ge ",
        "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u222a": r"\cup ", "\u2229": r"\cap ",
        "\u2208": r"\in ", "\u2236": ":",
    }
)  # fmt: skip
# A brace that opens a system of equations has no mate but the dot of \right.
_SYSTEM = re.compile(r"\\left\s*\\\{((?:(?!\\right).)*)\\right\s*\.", re.DOTALL)
_MEMBER = re.compile(r"[A-Za-z]\s*\\in(?![A-Za-z])\s*")
_MIXED = re.compile(r"(?<![\w.^/}])(\d{1,30}) (\d{1,30}) ?/ ?(\d{1,30})(?![\w.])")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# Groups of three digits between commas that are no list: nothing of one stands around them.
_THOUSANDS = re.compile(r"(?<![\w.,([{])(\d{1,3}(?:,\d{3})+)(?![\d,)\]}]|\\})")
_GROUP = r"(?<=\d)(?:{})(?=\d{{3}}(?!\d))"
_SURE_GROUP = re.compile(_GROUP.format(r"\{,\}|,?\\!"))
# 2 125/216 is a mixed number, 12 345/6 is none: which one, its fraction says.
_SPACED_GROUP = re.compile(_GROUP.format(" ") + r"(?!\d{3} ?/)")

_INNER = r"(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\])*\})*\})*"
_GROUPED = re.compile(r"\{" + _INNER + r"\}")


def readable(text: str) -> str:
    """``text`` with what people and models write around and in mathematics made LaTeX's own."""
    text = text.strip().replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    text = _SYSTEM.sub(r"\1", text).translate(_SYMBOLS)
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3] or ''}}}", text)
    text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_LOWERED)}}}", text)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = _SURE_GROUP.sub("", _STYLE.sub("", text)).replace("\\!", "").replace("{,}", ",")
    text = re.sub("[\u2212\ufe63\uff0d]", "-", text)
    text = _SPACE.sub(" ", _SIGN.sub(r"\1\2-", text)).strip()
    text = _SPACED_GROUP.sub("", re.sub(" +", " ", text)).replace("\u2044", "/")
    text = _MEMBER.sub("", _MIXED.sub(_improper, text), count=1)
    if match := _RELATION.match(text):
        text = text[match.end() :]
    return re.sub(r"^([-+]) ", r"\1", text)


def spelled(text: str) -> str:
    """``text`` in one spelling, but for commas: groups of thousands, or a list."""
    box = BOX.match(text.strip())
    if box is not None and text.strip().endswith("}"):
        text = text.strip()[box.end() : -1]
    text = readable(text)
    while (plainer := _WRAPPER.sub(r"\1", text)) != text:
        text = plainer
    text = _DEGREES.sub("\u00b0", re.sub(" +", " ", text)).replace("\\%", "%")
    text = _SHORT_FRACTION.sub(_whole_fraction, text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"(?<!\.)\.$", "", text).strip()
    while _GROUPED.fullmatch(text):
        text = text[1:-1].strip()
    return text.removeprefix("+").lstrip()


def without_thousands(text: str) -> str:
    return _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)


def normalize_answer(text: str) -> str:
    r"""``text`` in one spelling: without $, ``\text{}``, bold, thousands commas, a final dot."""
    return without_thousands(spelled(text))


def _improper(match: re.Match[str]) -> str:
    """A mixed number as a fraction, where its own fraction is below one; else a grouped top."""
    whole, top, bottom = match.groups()
    if int(top) < int(bottom):
        return f"\\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}"
    return f"{whole}{top}/{bottom}" if len(top) == 3 else match[0]


def _whole_fraction(match: re.Match[str]) -> str:
    parts = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups())
    return "\\frac" + "".join(parts)
