"""One request and its answer: what is known of it, and how it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from serving.gateway.refusal import Headers, Refusal

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
#: nosniff: an answer quotes what was asked, and no browser may take it for a page.
ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class Disconnected(Exception):
    """The client has gone: there is nobody to answer."""


class Exchange:
    """One request on its way through the gateway.

    Attributes:
        id: of the request: in the answer's ``x-request-id``, in the log and in the engine's log.
        headers: of the request, lower case; the last of several.
        extra: headers of the answer that are known before it is.
        status: of the answer; 0 before it began.
        ended: the answer is complete.
        key, model: names, once they are known.
        prompt_tokens, answer_tokens: of the answer; `estimated` where the engine could not say.
        first: when the first token was sent, `last`: the newest, as of time.monotonic; 0: none yet.
    """

    __slots__ = (
        "answer_tokens", "began", "ended", "estimated", "extra", "first", "headers", "id", "key", "last", "method",
        "model", "path", "prompt_tokens", "query", "receive", "send", "status",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began = time.monotonic()
        self.id = secrets.token_hex(12)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.receive, self.send = receive, send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.extra: list[tuple[bytes, bytes]] = [(b"x-request-id", self.id.encode())]
        self.status = 0
        self.ended = False
        self.key = ""
        self.model = ""
        self.prompt_tokens = self.answer_tokens = 0
        self.estimated = False
        self.first = self.last = 0.0

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, *ALWAYS, *self.extra]})

    async def reply(self, status: int, body: bytes, headers: Headers = (JSON,)) -> None:
        """The whole answer at once."""
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.end(body)

    async def end(self, body: bytes = b"") -> None:
        """The last bytes of the answer."""
        self.ended = True
        await self.send({"type": "http.response.body", "body": body})

    async def json(self, content: dict[str, Any], status: int = 200) -> None:
        await self.reply(status, json.dumps(content).encode())

    async def refuse(self, refusal: Refusal) -> None:
        """The error as the answer, or as the last event of a streamed answer that has begun."""
        if not self.status:
            # Each header once: limits are told with the refusal and are known before it.
            names = {name for name, _ in refusal.headers}
            self.extra = [(name, value) for name, value in self.extra if name not in names]
            await self.reply(refusal.status, refusal.body(), [JSON, *refusal.headers])
        else:
            self.status = refusal.status  # for the log: the client saw 200, and then this
            await self.end(b"data: " + refusal.body() + b"\n\n")

    @contextlib.asynccontextmanager
    async def while_connected(self) -> AsyncIterator[None]:
        """Cancel the block when the client goes away before the answer is complete.

        Raises:
            Disconnected: it did.
        """
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            if not self.ended:  # servers say the same of an answer that is complete
                gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if gone and task.uncancel() == 0:
                raise Disconnected from None
            raise
        finally:
            watcher.cancel()
