"""Published recipes as files of flags: ``--preset NAME`` is NAME.args of this directory.

Where each value comes from stands in docs/recipes.md.  Standard library only.
"""

from __future__ import annotations

import shlex
from pathlib import Path

_DIRECTORY = Path(__file__).resolve().parent


def read_flags(path: Path) -> list[str]:
    """The flags of a file, in which # starts a comment; ValueError where it cannot be read."""
    try:
        return shlex.split(path.read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as flags ({error})") from error


def preset_names() -> list[str]:
    """What --preset may name."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.args"))


def preset_flags(name: str) -> list[str]:
    """The flags of a preset; another one's come first where it starts from that (--preset).

    Raises:
        ValueError: there is no such preset; lists those there are.
    """
    if name not in preset_names():
        raise ValueError(
            f"--preset {name}: no such preset; choose one of {', '.join(preset_names())}"
        )
    return read_flags(_DIRECTORY / f"{name}.args")
