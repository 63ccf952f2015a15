"""Units and currencies beside a number: which word is one, and which words are the same one."""

from __future__ import annotations

import re

# Words that are no unit (million, dozen, pm) change the number: they stay in the answer.
_TABLE = """
mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre;
in inch inches; ft foot feet; yd yard; mi mile; s sec second; min minute; h hr hour; day; week;
month; year; mg milligram; g gram; kg kilogram; lb pound; oz ounce; ton; l L liter litre; ml mL;
dollar USD; cent \u00a2; \u20ac euro EUR; \u00a3 GBP; \u00a5 yuan yen CNY JPY;
\u20b9 rupee INR Rs; unit; mph;
"""
_NAMES = {
    spelling: words.split()[0]
    for words in _TABLE.split(";")
    for word in words.split()
    for spelling in ((word, word + "s") if len(word) > 2 else (word,))
}
_WORD = "|".join(sorted(map(re.escape, _NAMES), key=len, reverse=True))
_POWERED = rf"(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_WORD})\.?(?:\s*\^\s*\{{?\s*[23]\s*\}}?)?"
# 5 m is a length, 5m a product; words of two letters and more need no space.
_FIRST = rf"(?:(?<=\d )|(?=\S\S|[\u20ac\u00a3\u00a5\u20b9\u00a2])){_POWERED}"
_AFTER = re.compile(rf"(.*[\d}})]) ?({_FIRST})((?: ?/ ?| per )(?:{_WORD}))?", re.DOTALL)
_BEFORE = re.compile(
    r"([-+]?)([\u20ac\u00a3\u00a5\u20b9]|USD|EUR|GBP|CNY|JPY|INR|Rs\.?) ?(?=[\d.\\])(.*)", re.DOTALL
)


def split_unit(text: str) -> tuple[str, str]:
    """``text`` without its unit, and the unit in one spelling; the unit is empty where none is."""
    if text[-1:] in ("%", "\u00b0"):
        return text[:-1].rstrip(), text[-1]
    if match := _BEFORE.fullmatch(text):
        return match[1] + match[3], _NAMES[match[2].rstrip(".")]
    if match := _AFTER.fullmatch(text):
        return match[1].rstrip(), _one_spelling(match[2]) + _one_spelling(match[3] or "")
    return text, ""


def _one_spelling(unit: str) -> str:
    power = "3" if re.search(r"cu|\^\s*\{?\s*3", unit) else "2" if re.search(r"sq|\^", unit) else ""
    words = re.findall(r"[^\W\d_]+|[\u20ac\u00a3\u00a5\u20b9\u00a2]", unit)
    names = [_NAMES[word] for word in words if word in _NAMES]
    return "/" * ("/" in unit or "per " in unit) + "".join(names) + power
