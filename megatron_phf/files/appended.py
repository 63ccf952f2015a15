"""A JSON Lines file that a run appends to, whatever its disk does meanwhile."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from typing import Any


def finite(value: Any) -> Any:
    """NaN and infinity become null: JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class AppendedLines:
    """Lines behind those of a file, for one process.

    Those that the disk does not take wait in memory for the next ones; what was half written is cut
    off again.  So no line is lost, torn or twice in a file whose disk has had room again.
    """

    def __init__(self, path: str, flag: str) -> None:
        self._path, self._flag = path, flag
        self._waiting: list[bytes] = []
        self._error: OSError | None = None

    def add(self, objects: Iterable[dict[str, Any]]) -> str | None:
        """Append one JSON object a line; what to warn of, where they wait and none did before."""
        self._waiting += [json.dumps(finite(each)).encode() + b"\n" for each in objects]
        before, self._error = self._error, None
        try:
            if self._waiting:
                self._write()
        except OSError as error:
            self._error = error
            if before is None:
                return f"warning: {self.problem()}; they wait in memory, and the run goes on"
        return None

    def last_problem(self) -> str | None:
        """The problem after a last attempt."""
        self.add([])
        return self.problem()

    def problem(self) -> str | None:
        """What is not in the file, as an error."""
        if self._error is None:
            return None
        lines = f"{len(self._waiting)} line(s) cannot be written ({self._error.strerror})"
        return f"{self._flag} {self._path}: {lines}; is the disk full?"

    def _write(self) -> None:
        os.makedirs(os.path.dirname(os.path.realpath(self._path)), exist_ok=True)
        with open(self._path, "ab", buffering=0) as f:
            size, rest = f.seek(0, os.SEEK_END), memoryview(b"".join(self._waiting))
            try:
                while rest:
                    rest = rest[f.write(rest) :]
            except OSError:
                f.truncate(size)
                raise
        self._waiting.clear()
