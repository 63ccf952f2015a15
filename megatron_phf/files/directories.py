"""Output directories that are whole, or as they were."""

from __future__ import annotations

import os
from collections.abc import Callable

from safetensors import SafetensorError

from megatron_phf.files.replace import PARTIAL, mark, remove, replace_directory
from megatron_phf.runtime import parallel


def write_directory(target: str, flag: str, write: Callable[[str], None]) -> str | None:
    """On rank 0: let ``write`` fill a directory beside ``target``, then rename it.

    What is there must be an earlier export of ours, or empty; a symbolic link stays one.

    Returns:
        What went wrong (disk full, no permission, something else is there), for
        ``parallel.raise_together``; None on the other ranks, which do nothing here.
    """
    if not parallel.is_first_rank():
        return None
    partial = os.path.realpath(target) + PARTIAL
    try:
        remove(partial)
        os.makedirs(partial)
        write(partial)
        mark(partial)
        replace_directory(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # each reports a full disk
        remove(partial)
        return f"{flag} {target}: cannot be written ({error})"
    return None
