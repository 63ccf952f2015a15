"""Files and directories that are whole, or as they were; nothing of the user's is removed.

What is written lies beside its place first, under a name that only this program uses, and is
renamed when it is complete.  No import of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import IO, Any

# Endings of names that are this program's alone: what bears them may be removed.
PARTIAL, OLD = ".megatron_phf-partial", ".megatron_phf-old"
# In every exported directory: what was written there, so that a later export knows it again.
MARKER = "megatron_phf_export.json"
_WHOLE, _SAMPLES, _SAMPLE_BYTES = 2**24, 16, 2**20


@contextlib.contextmanager
def new_file(path: str, errors: str = "strict") -> Iterator[IO[str]]:
    """A text file that appears at ``path`` when the block ends; after an error the old one stays.

    A symbolic link stays one: what it leads to is replaced.
    """
    path = os.path.realpath(path)
    try:
        with open(path + PARTIAL, "w", encoding="utf-8", errors=errors) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + PARTIAL, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path + PARTIAL)
        raise


def write_text(path: str, text: str) -> None:
    """Write a whole text file, or leave the old one."""
    with new_file(path) as f:
        f.write(text)


def write_json(path: str, content: Any, indent: int = 1) -> None:
    """Write a whole JSON file, or leave the old one."""
    with new_file(path) as f:
        json.dump(content, f, indent=indent, ensure_ascii=False)


def check_new_text(path: str, text: str) -> None:
    """Raise ValueError where there is a file with another content than ``text``."""
    if not os.path.lexists(path):
        return
    try:
        with open(path, "rb") as f:
            same = f.read() == text.encode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: is there, and cannot be read ({error.strerror})") from error
    if not same:
        raise ValueError(
            f"{path}: is there already, with other content; remove it, or name another one"
        )


def write_new_text(path: str, text: str) -> None:
    """Write a file that is not there yet, or has this content already; ValueError as above."""
    check_new_text(path, text)
    write_text(path, text)


def remove(path: str) -> None:
    """Remove a file or directory of our own, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def free_number(paths: Iterable[str]) -> int:
    """The first number N from 1 on for which no PATH.N is there."""
    names, number = list(paths), 1
    while any(os.path.lexists(f"{name}.{number}") for name in names):
        number += 1
    return number


def set_aside(paths: Iterable[str]) -> list[str]:
    """Rename those of ``paths`` that are there to PATH.N, with one N for all; the new names."""
    there = [path for path in paths if os.path.lexists(path)]
    number = free_number(there)
    for path in there:
        os.rename(path, f"{path}.{number}")
    return [f"{path}.{number}" for path in there]


def digest(path: str) -> dict[str, Any]:
    """Size and sha256 of a file; of a large one, of 16 MiB spread over it."""
    size, found = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as f:
        if size <= _WHOLE:
            found.update(f.read())
        for i in range(_SAMPLES if size > _WHOLE else 0):
            f.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            found.update(f.read(_SAMPLE_BYTES))
    return {"bytes": size, "sha256": found.hexdigest()}


def _files_below(directory: str) -> list[str]:
    found = []
    for parent, folders, names in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*names, *links]:
            found.append(os.path.relpath(os.path.join(parent, name), directory))
    return sorted(name for name in found if name != MARKER)


def mark(directory: str) -> None:
    """Note in a directory that its files are ours, as they are now."""
    files = {name: digest(os.path.join(directory, name)) for name in _files_below(directory)}
    write_json(
        os.path.join(directory, MARKER), {"written_by": "megatron_phf", "format": 1, "files": files}
    )


def _difference(directory: str, known: dict[str, Any]) -> str | None:
    for name in _files_below(directory):
        path = os.path.join(directory, name)
        if name not in known:
            return f"has {name} in it, which was not exported"
        if known[name]["bytes"] != os.path.getsize(path) or known[name] != digest(path):
            return f"has another {name} in it than was exported"
    return None


def not_ours(directory: str) -> str | None:
    """Why a directory must not be replaced; None where it is missing, empty, or our own export.

    Our own: it has our marker, and no file that the marker does not name or names with another
    content.
    """
    if not os.path.lexists(directory):
        return None
    if not os.path.isdir(directory):
        return "is a file"
    if not os.listdir(directory):
        return None
    try:
        with open(os.path.join(directory, MARKER), encoding="utf-8") as f:
            content = json.load(f)
        return _difference(directory, content["files"])
    except FileNotFoundError:
        return f"is not empty, and no export of this program (it has no {MARKER})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read, or its {MARKER} is damaged ({error})"


def is_copy(directory: str, original: str) -> bool:
    """Whether every file of ``directory`` lies in ``original`` too, with the same content."""
    try:
        known = {name: digest(os.path.join(original, name)) for name in _files_below(directory)}
        return bool(known) and _difference(directory, known) is None
    except OSError:
        return False


def replace_directory(partial: str, target: str) -> None:
    """Put ``partial`` in the place of ``target``; an earlier export goes once the new one stands.

    Raises:
        OSError: there is something that is not ours, or it cannot be written; ``target`` is as it
            was.
    """
    target = os.path.realpath(target)
    reason = not_ours(target)
    if reason is not None:
        raise FileExistsError(f"it {reason}")
    old = target + OLD
    moved = os.path.lexists(target)
    if moved:
        remove(old)
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if moved:
            os.rename(old, target)
        raise
    remove(old)
