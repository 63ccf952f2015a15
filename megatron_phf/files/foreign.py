"""The JSON files of a HuggingFace directory, read as what they are: input from elsewhere.

Nothing in them is trusted to be there, of its type, finite, or a name inside the directory.  Plain
Python, no import of torch or transformers.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# A size or position beyond this is damage, not a model.
_LARGEST = 2**40


class RefusedJson(ValueError):
    """JSON that can be read in more than one way, or not at all; the text says what it has."""


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):  # readers differ in which of them counts
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RefusedJson(f"has the key {shown(twice)} twice in one object; remove one")
    return content


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # Python's limit of digits
        digits = len(text.lstrip("-"))
        raise RefusedJson(
            f"has an integer of {digits} digits, which is too long to read; write it as a string"
        ) from error


def parse_json(text: str) -> Any:
    """The value of a JSON text, as the standard has it: no NaN, no Infinity, no key twice.

    Raises:
        RefusedJson: a key stands twice in an object, or an integer is too long to read.
        ValueError: not JSON, or nested too deeply to read.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_int=_integer, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_problem(error: ValueError) -> str:
    """What an error of :func:`parse_json` says of a file: ``is not JSON (...)``, ``has ...``."""
    return str(error) if isinstance(error, RefusedJson) else f"is not JSON ({error})"


def read_json_object(path: str, hint: str = "is --hf-model right?") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        hint: what an error about a file that is not there ends with.

    Raises:
        ValueError: it cannot be read, is damaged, or holds something else; names the file.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:  # not UTF-8, or no possible path
        raise ValueError(f"{path}: cannot be read ({error}); copy it again") from error
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {json_problem(error)}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object but {type(content).__name__}")
    return content


def shown(value: object) -> str:
    """``value`` for an error message: one line, short, printable."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deeply, or too long an integer
        text = type(value).__name__
    return text if len(text) <= 60 else text[:60] + "..."


class Fields:
    """Typed look-ups in one object; each error names the file, the field and what it needs."""

    def __init__(self, path: str, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content

    def _value(self, name: str, default: Any, nullable: bool = False) -> Any:
        """A null counts as missing where ``nullable``, and is a mistake elsewhere."""
        value = self.content.get(name)
        if value is None and (nullable or name not in self.content):
            value = default
        if value is None:
            what = "null" if name in self.content else "missing"
            raise ValueError(f"{self.path}: {name!r} is {what}; copy the model again")
        return value

    def _refuse(self, name: str, value: Any, needed: str) -> NoReturn:
        raise ValueError(
            f"{self.path}: {name!r} is {shown(value)}, not {needed}; copy the model again"
        )

    def size(self, name: str, default: int | None = None, nullable: bool = False) -> int:
        """A whole number from 1 on."""
        value = self._value(name, default, nullable)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            self._refuse(name, value, "a whole number from 1 on")
        return value

    def number(self, name: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above 0, or 0 where ``zero`` allows it."""
        value = self._value(name, default)
        good = type(value) in (int, float) and 0 <= value <= _LARGEST and (value > 0 or zero)
        if not good:
            self._refuse(name, value, f"a number {'from 0 on' if zero else 'above 0'}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false, not something that Python would take for it."""
        value = self._value(name, default)
        if type(value) is not bool:
            self._refuse(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if type(value) is not str:
            self._refuse(name, value, "a string")
        return value

    def table(self, name: str) -> Fields:
        """An object inside this one; empty where missing or null."""
        value = self._value(name, {}, nullable=True)
        if type(value) is not dict:
            self._refuse(name, value, "an object")
        return Fields(self.path, value)


def check_file_name(name: object, where: str) -> str:
    """``name``, where it can only mean a file of the directory it is looked up in.

    Raises:
        ValueError: it has separators, is empty, or leads elsewhere; says ``where`` it stands.
    """
    good = type(name) is str and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not good:
        raise ValueError(f"{where}: {shown(name)} is not the plain name of a file beside it")
    return str(name)


def check_weight_index(directory: str) -> None:
    """Refuse an index that points outside ``directory`` or at files that are not there.

    Raises:
        ValueError: names the index and the entry; a directory without an index is fine.
    """
    path = os.path.join(directory, INDEX_FILE)
    if not os.path.lexists(path):
        return
    weights = Fields(path, read_json_object(path)).table("weight_map").content
    if not weights:
        raise ValueError(f"{path}: its weight_map is empty; copy the model again")
    for weight, name in weights.items():
        check_file_name(name, f"{path}: weight_map[{shown(weight)}]")
    for name in sorted(set(weights.values())):
        if not os.path.isfile(os.path.join(directory, name)):
            raise ValueError(f"{path}: {shown(name)} is missing; copy the model again")
