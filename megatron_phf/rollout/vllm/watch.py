"""Runs a command for as long as standard input is open: ``python watch.py COMMAND...``.

The one who started it holds the other end of a pipe; however it ends, SIGKILL included, the pipe
closes, and so ends the command with all that it has started.  Imports nothing of the package.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

SECONDS_TO_END = 10.0


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    try:
        os.killpg(process.pid, how)
    except ProcessLookupError:  # nobody is left
        return


def watched(command: list[str]) -> int:
    """The command's exit status, or 0 where standard input ended first."""
    # A group of its own, which the signals of a terminal or launcher do not reach.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        if select.select([sys.stdin], [], [], 0.2)[0] and not os.read(sys.stdin.fileno(), 1):
            break
    status = process.poll()
    _end(process, signal.SIGTERM)
    until = time.monotonic() + SECONDS_TO_END
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    _end(process, signal.SIGKILL)  # what it left behind
    process.wait()
    return status or 0


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # the pipe says when
    sys.exit(watched(sys.argv[1:]))
