"""The engine's own HTTP server, inside its replica: tokens go from vLLM straight to the gateway, past Ray's data path.

Ray Serve still decides which replica takes a request, and counts it: the gateway holds a place (`Front.hold`, a
streaming call that lasts as long as the request), and with it gets a ticket that is good for one HTTP request to this
server at a time. Queueing, autoscaling, draining and limits are Serve's as for any call; only the bytes take the short
way. A place lasts a moment longer than its request, for the next one (`serving.places`).

Limits: HTTP in clear between gateway and replica; whoever reads the cluster's own network reads prompts (the same is
true of Ray's traffic unless its TLS is on).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from ray_ft.hosts import bracketed
from serving import address

TICKET = "x-ray-ft-ticket"
ENDED = (b"x-ray-ft-place", b"ended")  # tells a refusal from one by the engine
ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
UNUSED_SECONDS = 30.0  # a gateway that was given a place asks at once; one that died never does
KEPT_SECONDS = 0.3  # for which the place of an answered request waits for another one
LONGEST_SECONDS = 5.0  # after which a place takes no other request: Serve is to choose again, and to be able to drain
STOP_SECONDS = 5

Scope = MutableMapping[str, Any]


@dataclass
class _Ticket:
    used: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Front:
    """Serves an ASGI application on a port of its own to holders of tickets."""

    def __init__(self, app: Any, host: str) -> None:
        self._app, self._host = app, host
        self._tickets: dict[str, _Ticket] = {}
        self._busy = 0
        self._moved = time.monotonic()  # when the engine last did anything, or a request came to an idle one
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        config = uvicorn.Config(
            self, host=self._host, port=0, loop="none", http="httptools", ws="none", lifespan="off", log_level="error",
            access_log=False, server_header=False, date_header=False, timeout_keep_alive=600,
            timeout_graceful_shutdown=STOP_SECONDS,
        )  # fmt: skip
        listening = address.listening(self._host, 0)
        self._url = f"http://{bracketed(self._host)}:{listening.getsockname()[1]}"
        self._server = Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))

    async def stop(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def hold(self) -> AsyncIterator[dict[str, Any]]:
        """Yield where to send a request and what to send along, then last until no other follows its answer."""
        name = secrets.token_urlsafe(24)
        ticket = self._tickets[name] = _Ticket()
        try:
            yield {"url": self._url, "headers": {TICKET: name}}
            until, patience = time.monotonic() + LONGEST_SECONDS, UNUSED_SECONDS
            while await _within(patience, ticket.used):
                await ticket.done.wait()
                if time.monotonic() > until:
                    return
                patience = KEPT_SECONDS
        finally:
            self._tickets.pop(name, None)

    def moved(self) -> None:
        """The engine has done a step: an answer that is sent as a whole may be minutes of them without a byte."""
        self._moved = time.monotonic()

    def idle_seconds(self) -> float:
        """Seconds without a step or a byte while requests are under way; 0 where there are none."""
        return time.monotonic() - self._moved if self._busy else 0.0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        name = next((value.decode() for key, value in scope.get("headers", ()) if key == TICKET.encode()), "")
        ticket = self._tickets.get(name)
        if scope["type"] != "http" or ticket is None or ticket.used.is_set() or scope["path"] not in ANSWERED:
            await _refuse(scope, send)
            return
        ticket.used.set()
        ticket.done.clear()
        if not self._busy:
            self.moved()
        self._busy += 1

        answered = False

        def free() -> None:
            nonlocal answered
            if not answered:
                answered = True
                ticket.used.clear()
                ticket.done.set()

        async def moving(message: MutableMapping[str, Any]) -> None:
            self.moved()
            if message["type"] == "http.response.body" and not message.get("more_body"):
                free()  # not when the application returns, which it may after more work: the next request comes before
            await send(message)

        try:
            await self._app(scope, receive, moving)
        finally:
            self._busy -= 1
            free()


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether the event is set in time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return event.is_set()  # in the same turn of the loop
    return True


async def _refuse(scope: Scope, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 404, "headers": [ENDED, (b"content-length", b"0")]})
        await send({"type": "http.response.body"})


class Server(uvicorn.Server):
    """uvicorn in a process whose signals are another's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def on_step(client: Any, told: Callable[[], None]) -> None:
    """Be told whenever vLLM's engine has done a step, of which it sends statistics also where no answer moves on."""
    processor = client.output_processor
    update = processor.update_scheduler_stats

    def updated(*given: Any, **named: Any) -> None:
        told()
        update(*given, **named)

    processor.update_scheduler_stats = updated
