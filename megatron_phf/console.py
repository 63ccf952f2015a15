"""Standard output and error of every program here."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Protocol


class Program(Protocol):
    """What a command's file and its console script call."""

    def __call__(self, argv: list[str] | None = None) -> int:
        """Run on ``argv`` (None: the process's own arguments); the exit status."""


def print_anything() -> None:
    """Let prints succeed whatever the terminal's encoding: what it lacks appears as \\u escapes.

    The first thing that a program does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def program(main: Callable[[list[str] | None], int]) -> Program:
    """Make ``main`` a program's: whatever it prints succeeds, and a mistake is a line and status 2.

    A mistake is a ValueError, or a file that cannot be read or written.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        print_anything()
        try:
            return main(argv)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
