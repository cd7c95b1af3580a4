"""How the gateway is run under uvicorn: with httptools, and limits that uvicorn leaves out.

httptools, not h11: sending a chunk costs 2.4 µs in it and 5.8 µs in h11. Its parser (llhttp, Node.js's) is strict: two
lengths, a length beside ``Transfer-Encoding``, bare line feeds and folded headers are refused, so nothing behind or
before reads a request's end elsewhere. What it lacks against h11 is a limit on headers, added here, with limits that
neither has: a head has to arrive in time, and a chunked body has no trailers.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Bytes of a request's head: line and headers. As nginx's default: four buffers of 8 KiB.
HEAD_BYTES = 32 << 10
HEADERS = 64
#: A head has to arrive within this time, also the first on a connection that was opened and says nothing.
HEAD_SECONDS = 10.0
#: Bytes in which there is no whole head and no piece of a body: a header, or a chunk's length, that does not end.
UNREAD_BYTES = HEAD_BYTES
#: Connections at once; one more is answered with 503.
CONNECTIONS = 4096


def config(app: Any, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for the gateway.

    Args:
        app: the gateway.
        options: host, port, and what should differ. Where an event loop runs already (`uvicorn.Server.serve`), it is
            used; in a process of its own the loop is uvloop.
    """
    settings: dict[str, Any] = {
        "loop": "uvloop",
        "http": Guarded,
        "ws": "none",
        "lifespan": "on",
        "access_log": False,  # the gateway writes its own, with names of keys
        "log_level": "error",
        "server_header": False,
        "proxy_headers": False,  # who asks is told by keys; addresses of clients are used nowhere
        "timeout_keep_alive": 75,
        "limit_concurrency": CONNECTIONS,
        "backlog": 2048,
    }
    return uvicorn.Config(app, **{**settings, **options})


class Guarded(HttpToolsProtocol):
    """uvicorn's protocol with limits on what a client may send before the application sees it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = True
        self._head = self._count = 0
        self._unread = 0  # bytes since the parser last told of anything whole
        self._told = False
        self._timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._expect_head()
        self._told = False
        super().data_received(data)
        self._unread = 0 if self._told else self._unread + len(data)
        if self._unread > UNREAD_BYTES:
            self._close(b"431 Request Header Fields Too Large" if self._in_head else b"400 Bad Request")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head = self._count = 0

    def on_url(self, url: bytes) -> None:
        self._check_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count += 1
        self._check_head(len(name) + len(value) + 4)
        if self._count > HEADERS or not self._in_head:
            raise ValueError("too many headers, or a trailer")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._told = False, True
        self._forget_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._told = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = self._told = True  # the next one's head

    def send_400_response(self, msg: str) -> None:
        self._close(b"400 Bad Request")

    def _check_head(self, size: int) -> None:
        self._head += size
        if self._head > HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser makes it its own error, answered with 400

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close, b"408 Request Timeout")

    def _forget_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, status: bytes) -> None:
        """End the connection, with a word where no answer is on its way."""
        self._forget_head()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
