"""Files and directories that are whole, or as they were.  No import of torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import Any


def write_json(path: str, content: Any) -> None:
    """The whole file appears, or the old one stays."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1, ensure_ascii=False)
    os.replace(path + ".tmp", path)


def remove(path: str) -> None:
    """Remove a file or directory, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def replace_directory(partial: str, target: str) -> None:
    """Put ``partial`` in the place of ``target``; what was there goes once the new one stands.

    Raises:
        OSError: ``target`` is as it was.
    """
    target = target.rstrip("/")
    old = target + ".old"
    remove(old)
    moved = os.path.lexists(target)
    if moved:
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if moved:
            os.rename(old, target)
        raise
    remove(old)
