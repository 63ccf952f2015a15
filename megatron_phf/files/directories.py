"""Output directories that are whole, or as they were."""

from __future__ import annotations

import os
from collections.abc import Callable

from safetensors import SafetensorError

from megatron_phf.files.replace import PARTIAL, mark, remove, replace_directory
from megatron_phf.runtime.together import on_first_rank


def write_directory(
    target: str,
    flag: str,
    write: Callable[[str], None],
    meanwhile: Callable[[], object] | None = None,
) -> None:
    """Let rank 0's ``write`` fill a directory beside ``target``, then rename it; every rank calls.

    What is there must be an earlier export of ours, or empty; a symbolic link stays one.

    Args:
        meanwhile: the other ranks' part, as in :func:`on_first_rank`.

    Raises:
        ValueError: disk full, no permission, or something else is there; on every rank.
    """
    on_first_rank(_write, target, flag, write, meanwhile=meanwhile)


def _write(target: str, flag: str, write: Callable[[str], None]) -> None:
    partial = os.path.realpath(target) + PARTIAL
    try:
        remove(partial)
        os.makedirs(partial)
        write(partial)
        mark(partial)
        replace_directory(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # each reports a full disk
        remove(partial)
        raise ValueError(f"{flag} {target}: cannot be written ({error})") from error
