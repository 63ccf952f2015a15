"""One field of the settings: a flag with its help, the values it takes, and the flag it needs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """Which numbers, or names, a flag takes; ``text`` says it in its help and in an error."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Range:
    """Numbers from ``low`` on."""
    return Range(f"at least {low}", lambda value: value >= low)


ABOVE_0 = Range("above 0", lambda value: value > 0)
ABOVE_0_TO_1 = Range("above 0 to 1", lambda value: 0 < value <= 1)
FROM_0_TO_1 = Range("0 to 1", lambda value: 0 <= value <= 1)
FROM_0_TO_BELOW_1 = Range("0 to below 1", lambda value: 0 <= value < 1)
NAME = Range(
    "a name of at most 100 letters, digits, spaces and . _ - + =, the first a letter or a digit",
    lambda value: re.fullmatch(r"\w[\w .+=-]{0,99}", str(value)) is not None,
)
SEED = Range("0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


@dataclass(frozen=True)
class Choices:
    """The keys of the table that implements a flag's choices; its module imports no torch.

    ``module`` is below this package in imports, so it is named and looked up when asked.
    """

    module: str
    table: str
    before: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The choices, those without a row first."""
        table = getattr(importlib.import_module(f"megatron_phf.{self.module}"), self.table)
        return (*self.before, *table)


def flag(
    default: Any,
    text: str,
    allowed: Range | Choices | tuple[str, ...] | None = None,
    needs: str | None = None,
    alias: str | None = None,
    named: bool = False,
) -> Any:
    """A field that is a flag.

    Args:
        text: its help.
        allowed: a range of numbers (None passes), or the choices or the table that has them.
        alias: an earlier name, whose flag stays accepted.
        named: it may be given several times as NAME=VALUE, and all of them count.
        needs: the field without which this one has no effect, or ``field=value|value``.
    """
    known: dict[str, Any] = {"help": text, "needs": needs, "alias": alias, "named": named}
    known |= {"range": allowed if isinstance(allowed, Range) else None}
    known |= {"choices": None if isinstance(allowed, Range) else allowed}
    return field(default=default, metadata=known)


def missing_need(f: Field[Any], values: Mapping[str, Any]) -> str | None:
    """What a field with another value than its default lacks, as a flag with its value.

    ``values``: of all fields, by name.
    """
    needs = f.metadata["needs"]
    if needs is None or values[f.name] == f.default:
        return None
    name, _, wanted = needs.partition("=")
    enough = str(values[name]) in wanted.split("|") if wanted else bool(values[name])
    return None if enough else needed_flag(needs)


def needed_flag(needs: str) -> str:
    """The flag, with its value where it must have a certain one."""
    name, _, wanted = needs.partition("=")
    return " ".join(filter(None, ["--" + name.replace("_", "-"), wanted.replace("|", " or ")]))


def choices_of(known: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The choices of a field with this metadata, or None."""
    choices: Choices | tuple[str, ...] | None = known["choices"]
    return choices.names() if isinstance(choices, Choices) else choices
