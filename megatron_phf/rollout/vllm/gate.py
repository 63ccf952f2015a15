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

    def close(self, until: float) -> None:
        """Let nobody in any longer, and wait for those within.

        Raises:
            ValueError: somebody still is ``until`` (``time.monotonic()``).
        """
        with self._changed:
            self._open = False
            left = max(until - time.monotonic(), 0.0)
            if not self._changed.wait_for(lambda: not self._within, left):
                raise ValueError(
                    f"--vllm-url: {self._within} request(s) still run, and new weights wait for "
                    "them; raise --distributed-timeout-minutes"
                )

    def open(self) -> None:
        """Let everybody in again."""
        with self._changed:
            self._open = True
            self._changed.notify_all()
