"""Threads that sample while the main one does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Task = tuple["Future[Any]", Callable[[], Any]]


class Workers:
    """At most ``count`` threads; what comes first is begun first.

    They end with the process: unlike those of ``concurrent.futures``, whose exit would wait for
    answers (and ask everything still in the queue) that nobody needs any longer.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name, self._started = count, name, 0
        self._tasks: SimpleQueue[_Task] = SimpleQueue()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Let ``task`` run as soon as a thread is free."""
        future: Future[Any] = Future()
        self._tasks.put((future, task))
        if self._started < self._count:
            self._started += 1
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, task = self._tasks.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # of a thread: told to whoever asks for the result
                future.set_exception(error)
            del future, task  # else the last result lives on while nothing comes
