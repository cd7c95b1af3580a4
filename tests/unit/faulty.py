"""A server between a client and an HTTP service that answers 503, breaks connections off, or dawdles, by a seed."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Faulty:
    """Forwards to `target` ("host:port"); `with` starts and stops it.

    Attributes:
        rates: share of requests by fault: "busy" (503), "reset" (in the middle of the request's body, or of the answer
            where it has none), "slow" (0.3 s later). Any other is forwarded as it is.
        counts: faults made, and "good" requests.
    """

    def __init__(self, target: str, seed: int, **rates: float) -> None:
        self.rates, self.counts = rates, Counter[str]()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                fault = faulty.draw()
                chunked = self.headers.get("Transfer-Encoding") == "chunked"
                length = int(self.headers.get("Content-Length") or 0)
                if fault == "reset" and (length or chunked):
                    self.rfile.read(length // 2 or 1000)
                    return self.reset()
                body = self.chunks() if chunked else self.rfile.read(length)
                if fault == "busy":
                    return self.answer(503, [("Content-Type", "application/xml")], BUSY)
                if fault == "slow":
                    time.sleep(0.3)
                connection = http.client.HTTPConnection(target, timeout=30)
                try:
                    hop = ("connection", "transfer-encoding", "expect", "content-length")
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    content = response.read()
                finally:
                    connection.close()
                if fault == "reset":
                    self.answer(response.status, response.getheaders(), content, half=True)
                    return self.reset()
                return self.answer(response.status, response.getheaders(), content)

            def chunks(self) -> bytes:
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():  # trailers
                    pass
                return body

            def answer(self, status: int, headers: Any, content: bytes, half: bool = False) -> None:
                self.send_response_only(status)
                sized = [value for name, value in headers if name.lower() == "content-length"]
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                # The answer to HEAD has the length of what it does not send.
                self.send_header("Content-Length", sized[0] if self.command == "HEAD" and sized else str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if half else content)

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def finish(self) -> None:
                with contextlib.suppress(OSError):  # broken off above
                    super().finish()

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # clients that broke off

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def draw(self) -> str:
        with self._lock:
            at = self._rng.random()
            drawn = "good"
            for fault, rate in self.rates.items():
                if 0 <= at < rate:
                    drawn = fault
                at -= rate
            self.counts[drawn] += 1
            return drawn

    def __enter__(self) -> Faulty:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
