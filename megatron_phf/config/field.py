"""One field of the settings: a flag with its help, the values it takes, and the flag it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """Which numbers or names a flag takes; ``text`` says it in its help and in an error."""

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


def flag(
    default: Any,
    text: str,
    allowed: Range | tuple[str, ...] | None = None,
    needs: str | None = None,
    alias: str | None = None,
    named: bool = False,
) -> Any:
    """A field that is a flag.

    Args:
        text: its help.
        allowed: a range (None is none of them, and good), or the choices.
        alias: an earlier name, whose flag stays accepted.
        named: it may be given several times as NAME=VALUE, and all of them count.
        needs: the field without which this one has no meaning; for those that are off by default.
    """
    assert needs is None or not default
    kind = "choices" if isinstance(allowed, tuple) else "range"
    known: dict[str, Any] = {"help": text, "needs": needs, "alias": alias, "named": named}
    known |= {"choices": None, "range": None}
    return field(default=default, metadata=known | {kind: allowed})
