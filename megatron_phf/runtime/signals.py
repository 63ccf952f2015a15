"""Signals that ask for an orderly end; the second of them ends the process at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

# What schedulers send, Ctrl-C, and a terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# nohup and shells ignore these for a program that is to outlive them.  Job scripts ignore the rest
# for torchrun, which they would end; its ranks inherit that, and yet they are meant for the ranks.
_LEFT_IGNORED = (signal.SIGHUP, signal.SIGINT)
# Ctrl-C may reach a rank twice: from the terminal, and handed on by torchrun.
_SAME_SECONDS = 1.0


def _stays_ignored(number: int) -> bool:
    return number in _LEFT_IGNORED and signal.getsignal(number) is signal.SIG_IGN


class StopSignals:
    """Remembers the first signal.  Until :meth:`install` they end the process, as by default.

    A thread reads what the interpreter's C handler writes to a socket: the main thread may be
    waiting for another rank inside a collective, where no Python handler would run.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._installed = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def install(self) -> None:
        """From now on a signal waits for the end of the step."""
        if self._installed:
            return
        self._installed = True
        for number in STOP_SIGNALS:
            if not _stays_ignored(number):
                signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()

    def restore(self) -> None:
        """Signals end the process again; at once where one has come before."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            if not _stays_ignored(number):
                signal.signal(number, signal.SIG_DFL)

    def _watch(self) -> None:
        first = 0.0
        while received := self._reader.recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            again = number == self.received == signal.SIGINT
            if again and time.monotonic() - first < _SAME_SECONDS:
                continue
            if self.received is not None:
                os._exit(128 + number)
            self.received, first = number, time.monotonic()
