"""Several teachers, each by a name: ``--teacher-hf-model NAME=DIR``, given once for each."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from megatron_phf.config.settings import Config

_NAME = r"[\w.-]+="


def is_named(text: str) -> bool:
    """Whether a value has the form NAME=DIR (or is several of them), and is no directory itself."""
    return re.match(_NAME, text) is not None and not os.path.isdir(text)


def joined(before: str | None, text: str) -> str:
    """A flag given again: one more NAME=DIR counts beside those before it; else the last counts.

    Raises:
        ValueError: one has a name and the other has none.
    """
    if not before:
        return text
    if is_named(before) != is_named(text):
        raise ValueError(
            f"--teacher-hf-model {before} and {text}: one has a name and one has none; give "
            "NAME=DIR once a teacher, or a single DIR"
        )
    return f"{before},{text}" if is_named(text) else text


def teacher_directories(config: Config) -> dict[str, str]:
    """The other models by their names, in order; one without a name is called ''.

    Raises:
        ValueError: a name without a directory, or that two have.
    """
    text = config.teacher.teacher_hf_model
    if text is None:
        return {}
    if not is_named(text):
        return {"": text}
    found: dict[str, str] = {}
    for part in re.split(rf",(?={_NAME})", text):
        name, _, directory = part.partition("=")
        if name in found or not directory:
            problem = "no directory" if not directory else f"{found[name]} has that name already"
            raise ValueError(f"--teacher-hf-model {part}: {problem}; give NAME=DIR once a teacher")
        found[name] = directory
    return found


def teacher_names(config: Config) -> tuple[str, ...]:
    """Those that problems may ask for; empty where the teacher has no name."""
    return tuple(name for name in teacher_directories(config) if name)


def named_teacher(value: object, names: Sequence[str], where: str) -> str | None:
    """The teacher of a line whose ``teacher`` is ``value``: the first where it has none.

    None where no teacher has a name: whatever the field holds is not for us.

    Raises:
        ValueError: there is no such teacher; names ``where``.
    """
    if not names:
        return None
    if value is None:
        return names[0]
    if value not in names:
        raise ValueError(
            f"{where}: field 'teacher' is {value!r:.100}, but --teacher-hf-model names "
            f"{', '.join(names)}; correct it, or add that teacher"
        )
    return str(value)
