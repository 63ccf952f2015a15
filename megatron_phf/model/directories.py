"""Output directories that are whole, or as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from safetensors import SafetensorError

from megatron_phf import parallel
from megatron_phf.output import replace_directory


def write_directory(target: str, flag: str, write: Callable[[str], None]) -> str | None:
    """On rank 0: let ``write`` fill a directory beside ``target``, then rename it.

    Returns:
        What went wrong (disk full, no permission), for ``parallel.raise_together``; None on the
        other ranks, which do nothing here.
    """
    if not parallel.is_first_rank():
        return None
    partial = target.rstrip("/") + ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        write(partial)
        replace_directory(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # each reports a full disk
        shutil.rmtree(partial, ignore_errors=True)
        return f"{flag} {target}: cannot be written ({error})"
    return None
