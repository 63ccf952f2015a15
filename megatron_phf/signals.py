"""SIGTERM and SIGUSR1: the first asks for an orderly end, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import socket
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers the first signal.  Until :meth:`install` they end the process, as by default.

    A thread reads what the interpreter's C handler writes to a socket: the main thread may be
    waiting for another rank inside a collective, where no Python handler would run.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def install(self) -> None:
        """From now on a signal waits for the end of the step."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()

    def restore(self) -> None:
        """Signals end the process again; at once where one has come before."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] not in STOP_SIGNALS:
                continue
            if self.received is not None:
                os._exit(128 + received[0])
            self.received = received[0]
