"""Standard output and error of every program here."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Let prints succeed whatever the terminal's encoding: what it lacks appears as \\u escapes.

    The first thing that a program does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
