"""A grading function in a process of its own: whatever it does, the evaluation goes on.

The function ``f(generation, problem) -> bool`` may raise, hang, exhaust its memory or end its
process.  Each of these is one wrong answer and one logged line; the next answer finds a new process
where the old one is lost.  One JSON line a question and a reply, over pipes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron_phf.data.problems import Problem

GradingFunction = Callable[[str, Problem], bool]
START_SECONDS = 120.0  # imports of a plug-in, on a busy machine
MEMORY_BYTES = 4 * 2**30
_log = logging.getLogger(__name__)


def check_grader(spec: str) -> None:
    """Refuse what names no grader; imports nothing.

    Raises:
        ValueError: names ``--grader`` and what it takes.
    """
    module, colon, function = spec.partition(":")
    names = [*module.split("."), function]
    if spec not in ("math", "exact") and not (colon and all(n.isidentifier() for n in names)):
        raise ValueError(f"--grader {spec}: need math, exact or package.module:function")


class GraderProcess:
    """``target`` (``package.module:function``) in a process, ``timeout`` seconds an answer."""

    def __init__(self, target: str, timeout: float) -> None:
        self.target = target
        self.timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process where none runs.

        Raises:
            ValueError: the function cannot be imported; says why.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        search = [*filter(None, sys.path), os.getcwd()]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self.target, str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # its own children end with it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        )
        reply = self._reply(None, START_SECONDS)
        if "error" in reply:
            self.close()
            raise ValueError(reply["error"])

    def correct(self, generation: str, problem: Problem) -> bool:
        """The function's verdict; False, and a logged line, where it gives none."""
        question = {"generation": generation, "problem": dataclasses.asdict(problem)}
        try:
            self.start()
            reply = self._reply(question, self.timeout)
        except ValueError as error:  # its module can no longer be imported
            reply = {"error": str(error)}
        if "error" in reply:
            _log.warning(
                "grader %s: %s; problem %d, answer %s counts as wrong",
                self.target, reply["error"], problem.index, _short(generation),
            )  # fmt: skip
        return bool(reply.get("correct", False))

    def close(self) -> None:
        """End the process, and what it started."""
        if self._process is None:
            return
        _kill(self._process)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what a dead process never read
                pipe.close()  # type: ignore[union-attr]
        self._process = None

    def _reply(self, question: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """The next line; {"error": ...} from a process that is lost then."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, _kill, [process])
        begin = time.monotonic()
        timer.start()
        line = ""
        try:
            if question is not None:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, UnicodeDecodeError):  # it died while we wrote, or wrote something else
            pass
        finally:
            timer.cancel()
        if line.endswith("\n"):
            reply: dict[str, Any] = json.loads(line)
            if reply.get("lost"):
                self.close()
            return reply
        late = time.monotonic() - begin >= seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # its pipe closes a moment before it has a status
        self.close()
        ended = f"it ended (status {process.returncode})"
        return {"error": f"no verdict within {seconds:g} s" if late else ended}


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _short(text: str) -> str:
    shown = text if len(text) <= 80 else "..." + text[-77:]
    return ascii(shown)


def load_function(target: str) -> GradingFunction:
    """The function named ``package.module:function``.

    Raises:
        ValueError: there is none, or its module fails at import.
    """
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{name} of {module} is no function")
    return function


def _verdict(function: GradingFunction, question: dict[str, Any]) -> dict[str, Any]:
    try:
        verdict = function(question["generation"], Problem(**question["problem"]))
    except MemoryError:  # what it left behind would fail the next answer too
        return {"error": "out of memory", "lost": True}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {_short(str(error))}"}
    if not isinstance(verdict, bool):
        return {"error": f"returned {type(verdict).__name__}, not bool"}
    return {"correct": verdict}


@contextlib.contextmanager
def _own_stdout() -> Iterator[IO[str]]:
    """The pipe to the parent; what the function prints goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)
        yield pipe


def _serve(target: str, timeout: float) -> None:
    # Data, not address space: CUDA and allocators reserve far more addresses than they use.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    with _own_stdout() as pipe:

        def reply(content: dict[str, Any]) -> None:
            print(json.dumps(content), file=pipe, flush=True)

        try:
            function = load_function(target)
        except ValueError as error:
            reply({"error": str(error)})
            return
        reply({"ready": True})
        for line in questions:
            # Should the parent have been killed, nobody else would end a hanging function.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
            answer = _verdict(function, json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(answer)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
