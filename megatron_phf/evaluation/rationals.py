"""Exact rational numbers in one spelling: decimals, fractions, powers, factorials."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL.pattern})\s*(?:[eE]|(?:\\times|\\cdot|[\u00d7\u22c5\u00b7*])\s*10\s*\^\s*)"
    r"\{?\s*([-+]?\d{1,4})\s*\}?"
)
_POWER = re.compile(r"([-+]?)(\d{1,30})\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))")
_POWER_OF_TEN = re.compile(r"([-+]?)10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?")
_FACTORIAL = re.compile(r"([-+]?)(\d{1,4})\s*!")
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_PART = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_FRACTION = re.compile(rf"([-+]?)(\d*)\s*\\frac{_PART}{_PART}")
_SLASH = re.compile(r"([^/]+)/([^/]+)")


def rational(text: str, depth: int = 3) -> Fraction | None:
    """The number that normalised ``text`` without a unit is; None if it is none."""
    text = text.strip()
    if depth and text.startswith("(") and text.endswith(")"):
        return rational(text[1:-1], depth - 1)
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := _POWER_OF_TEN.fullmatch(text):
        return Fraction(match[1] + "1") * Fraction(10) ** int(match[2])
    if match := _POWER.fullmatch(text):
        base, exponent = int(match[2]), int(match[3] or match[4])
        return Fraction(match[1] + "1") * Fraction(base) ** exponent if base else None
    if match := _FACTORIAL.fullmatch(text):
        return Fraction(match[1] + "1") * math.factorial(int(match[2]))
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
    sign, whole, parts = "", "", None
    if match := _SLASH.fullmatch(text):
        parts = match[1], match[2]
    elif match := _FRACTION.fullmatch(text):
        sign, whole, parts = match[1], match[2], (match[3], match[4])
    if parts is None or not depth:
        return None
    top, bottom = (rational(part, depth - 1) for part in parts)
    if top is None or not bottom or (whole and not 0 < top < bottom):
        return None
    value = int(whole or 0) + top / bottom
    return -value if sign == "-" else value
