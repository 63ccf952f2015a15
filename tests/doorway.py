"""An HTTP server's door, at which a test can do something before a request that it counts to.

A test that watches for a moment and then acts comes too late where the server is fast.
"""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Doorway:
    """``with Doorway(url, path, number, act) as door: door.url``.

    The ``number``-th request (from 1) to ``path`` waits for ``act()``, and then has no answer;
    ``acted`` is set.  All others go through.
    """

    def __init__(self, url: str, path: str, number: int, act: Callable[[], object]) -> None:
        self.server, self.path, self.number, self.act = url, path, number, act
        self.count, self.lock, self.acted = 0, threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"door": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Doorway:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def is_the_one(self, path: str) -> bool:
        with self.lock:
            self.count += path == self.path
            return path == self.path and self.count == self.number


class _Handler(BaseHTTPRequestHandler):
    door: Doorway
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.close_connection = True
        if self.door.is_the_one(self.path):
            self.door.act()
            self.door.acted.set()
            return
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.door.server).netloc)
        try:
            connection.request(self.command, self.path, data, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            return  # as if nobody were there
        finally:
            connection.close()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST
