"""HTTP to one vLLM server: one attempt, bounded in time and size, and attempts until one succeeds.

Nothing is followed (redirects, proxies of the environment), and an answer is JSON or an error.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_phf.files.foreign import parse_json

_MOST_BYTES = 2**28
_LONGEST_WAIT = 60.0
# Statuses of a server that is busy, starting or stopping, and of what stands in front of it.
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_KEY_HELP = (
    "; the server wants a key: name a file with what its --api-key, or its VLLM_API_KEY, is "
    "(--vllm-api-key-file)"
)
T = TypeVar("T")


class TransientError(Exception):
    """A failure that another attempt may not meet; ``status``: of the answer, if there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class StatusError(Exception):
    """An answer that says what is wrong with the request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message}{_KEY_HELP if status == 401 else ''}")
        self.status, self.message = status, message


@dataclass(frozen=True)
class Patience:
    """How long a request is tried.

    ``timeout``: seconds an attempt; ``retries`` after the first, ``backoff`` s before the first of
    them, doubled each time up to a minute.
    """

    timeout: float
    retries: int
    backoff: float


class HttpServer:
    """One server by its URL."""

    def __init__(self, url: str, patience: Patience, api_key: str | None = None) -> None:
        self.url, self._patience = url, patience
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self.host, self._port, self._prefix = parts.hostname or "", parts.port, parts.path
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One attempt: the answer's JSON, or its text where it is none.

        Raises:
            TransientError: no (whole) answer in time, or one of a server in trouble.
            StatusError: any other status than 200.
        """
        end = time.monotonic() + self._patience.timeout
        connection = self._connection(self.host, self._port, timeout=self._patience.timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._prefix + path, data, self._headers)
            answer = connection.getresponse()
            text = _read(answer, connection, end).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(_reason(error)) from error
        finally:
            connection.close()
        if answer.status in _TRANSIENT_STATUSES:
            raise TransientError(f"status {answer.status}: {_message(text)}", answer.status)
        if answer.status != 200:
            raise StatusError(answer.status, _message(text))
        try:
            return parse_json(text)
        except ValueError:
            return text

    def until_it_succeeds(
        self,
        what: str,
        attempt: Callable[[], T],
        until: float,
        stopped: threading.Event | None = None,
    ) -> T:
        """``attempt`` again after each TransientError, with growing waits.

        Args:
            until: ``time.monotonic()`` after which nothing is tried again.
            stopped: set where nobody waits for the result any longer.

        Raises:
            ValueError: the last attempt failed too, or the request is refused.
        """
        wait, stopped = self._patience.backoff, stopped or threading.Event()
        first = ""
        for left in range(self._patience.retries, -1, -1):
            try:
                return attempt()
            except StatusError as error:
                raise ValueError(f"--vllm-url {self.url}: {what}: {error}") from error
            except TransientError as error:
                first = first or str(error)
                # Not all requests of a restarted server at the same moment.
                pause = wait * random.uniform(0.5, 1.0)
                late = time.monotonic() + pause > until
                if not left or late or stopped.is_set():
                    tried = self._patience.retries - left + 1
                    why = "" if first == str(error) else f" (at first: {first})"
                    why += "; the time of a rollout phase is over" if late and left else ""
                    raise ValueError(
                        f"--vllm-url {self.url}: {what} failed {tried} time(s), at last with: "
                        f"{error}{why}; is the server up? (--vllm-max-retries, "
                        "--vllm-timeout-seconds, --distributed-timeout-minutes)"
                    ) from error
                stopped.wait(pause)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")


def _read(answer: http.client.HTTPResponse, connection: Any, end: float) -> bytes:
    """The body, all of it before ``end``: a socket's own time-out starts anew with each byte."""
    parts: list[bytes] = []
    expected, size = answer.length, 0  # no length: chunked, or until the connection ends
    while expected is None or size < expected:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        if connection.sock is not None:
            connection.sock.settimeout(left)
        part = answer.read1(2**16 if expected is None else min(2**16, expected - size))
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise OSError(f"an answer of more than {_MOST_BYTES} bytes")
    if expected is not None and size < expected:
        raise http.client.IncompleteRead(b"", expected - size)
    return b"".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut off"
    return f"{type(error).__name__}: {error}"


def _message(text: str) -> str:
    """The message of an error's body; vLLM wraps it in an object, as OpenAI does."""
    try:
        content = parse_json(text)
    except ValueError:
        content = None
    if isinstance(content, dict):
        inner = content.get("error")
        content = inner if isinstance(inner, dict) else content
        text = str(content.get("message", content.get("error", text)))
    return ascii(text[:500])
