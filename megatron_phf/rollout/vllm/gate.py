"""What requests pass, and what holds them back while the servers' weights are replaced."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class Gate:
    """Open at first; several threads may be within at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._within, self._open = 0, True

    @contextlib.contextmanager
    def passed(self) -> Iterator[None]:
        """Within the gate, once it is open."""
        with self._changed:
            self._changed.wait_for(lambda: self._open)
            self._within += 1
        try:
            yield
        finally:
            with self._changed:
                self._within -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self, until: float) -> Iterator[str | None]:
        """Nobody is within; or the problem that somebody still is ``until`` (``monotonic``)."""
        with self._changed:
            self._open = False
            left = until - time.monotonic()
            empty = self._changed.wait_for(lambda: not self._within, max(left, 0.0))
        problem = (
            f"--vllm-url: {self._within} request(s) still run, and new weights wait for them; "
            "raise --distributed-timeout-minutes"
        )
        try:
            yield None if empty else problem
        finally:
            with self._changed:
                self._open = True
                self._changed.notify_all()
