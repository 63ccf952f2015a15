"""What one rank does for all, or each for itself, so that none waits for one that has failed."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_phf.runtime import parallel

T = TypeVar("T")


def on_first_rank(
    action: Callable[..., T],
    *args: Any,
    group: dist.ProcessGroup | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> T:
    """What ``action`` gives on rank 0, on every rank of ``group`` (of the world where None).

    Args:
        action: called on rank 0 alone; its result must be picklable.
        meanwhile: the others' part of what is collective in ``action``; rank 0 calls it afterwards,
            for what an error has left undone.

    Raises:
        Exception: that of ``action``, on every rank.
    """
    outcome: tuple[Any, Exception | None] = None, None
    if parallel.is_first_rank():
        outcome = _outcome(action, *args)
    if meanwhile is not None:
        meanwhile()
    found = parallel.broadcast_object(_sendable(outcome), group)
    error = outcome[1] or found[1]
    if error is not None:
        raise error
    return found[0]


def on_every_rank(
    action: Callable[..., T], *args: Any, group: dist.ProcessGroup | None = None
) -> T:
    """What ``action`` gives on this rank, once all of ``group`` have done it.

    Raises:
        Exception: that of the first rank with one, on every rank.
    """
    result, mine = _outcome(action, *args)
    for error in parallel.gather_objects(_sendable((None, mine))[1], group):
        if error is not None:
            raise error
    return result


def _outcome(action: Callable[..., T], *args: Any) -> tuple[Any, Exception | None]:
    try:
        return action(*args), None
    except Exception as error:
        if not isinstance(error, OSError | ValueError):  # a fault; other ranks lack its traceback
            error.add_note(f"where it was raised:\n{traceback.format_exc()}")
        return None, error


def _sendable(outcome: tuple[Any, Exception | None]) -> tuple[Any, Exception | None]:
    """The outcome as other ranks can read it: a few errors do not survive the way there."""
    error = outcome[1]
    try:
        pickle.loads(pickle.dumps(error))
        return outcome
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            copy.add_note(note)
        return None, copy
