"""One run a directory: a lock that rank 0 holds and the kernel lets go with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from typing import IO

_NAME = "run.lock"
# A killed run's rank 0 may take a moment to be gone when torchrun or SLURM starts it again.
_PATIENCE_SECONDS = 5.0


class RunLock:
    """An fcntl lock on DIR/run.lock, which says who holds it.

    The file stays behind and means nothing without the lock: there is no stale lock to remove.
    Not the package filelock's: see docs/design.md.
    """

    def __init__(self, directory: str, flag: str) -> None:
        """Take it.

        Raises:
            ValueError: another run holds it, the directory cannot be written, or the file there is
                not ours.
        """
        path = os.path.join(directory, _NAME)
        try:
            os.makedirs(directory, exist_ok=True)
            self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{flag} {directory}: cannot be written ({error.strerror})") from error
        try:
            taken = self._taken()
        except OSError as error:
            raise ValueError(
                f"{flag} {directory}: its file system has no locks ({error.strerror}); mount it "
                "with them, or name a directory elsewhere"
            ) from error
        if not taken:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{flag} {directory} is in use by {holder}; give this run a directory of its own, "
                "or stop that one"
            )
        self._file.seek(0)
        content = self._file.read()
        if content.strip() and '"pid"' not in content:
            self._file.close()
            raise ValueError(f"{flag} {directory}: its {_NAME} is of another program; rename it")
        self._file.truncate(0)
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": start}
        self._file.write(json.dumps(me) + "\n")
        self._file.flush()

    def _taken(self) -> bool:
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    return False
                time.sleep(0.2)

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()
