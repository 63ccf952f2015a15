"""One field of the settings: a flag with its help, the values it takes, and the flag it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
# Of a file or directory, in a directory that another flag names.
NAME = Range(
    "a name of at most 100 bytes, without / and without a dot at its start",
    lambda value: (
        value.isprintable()
        and 0 < len(value.strip().encode()) == len(value.encode()) <= 100
        and "/" not in value
        and not value.startswith(".")
    ),
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
    acts_with: str | None = None,
) -> Any:
    """A field that is a flag.

    Args:
        text: its help.
        allowed: a range of numbers (None passes), or the choices or the table that has them.
        alias: an earlier name, whose flag stays accepted.
        named: it may be given several times as NAME=VALUE, and all of them count.
        needs: the field without which this one has no meaning; for those that are off by default.
        acts_with: the field without which another value has no effect, or ``field=value|value``:
            said at the start, as presets and shared command lines have such values.
    """
    assert needs is None or not default
    known: dict[str, Any] = {"help": text, "needs": needs, "alias": alias, "named": named}
    known |= {"acts_with": acts_with}
    known |= {"range": allowed if isinstance(allowed, Range) else None}
    known |= {"choices": None if isinstance(allowed, Range) else allowed}
    return field(default=default, metadata=known)


def choices_of(known: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The choices of a field with this metadata, or None."""
    choices: Choices | tuple[str, ...] | None = known["choices"]
    return choices.names() if isinstance(choices, Choices) else choices
