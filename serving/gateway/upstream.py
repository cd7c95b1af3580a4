"""From the gateway to an engine and back: a place, one HTTP request, its answer passed on.

Limits: HTTP in clear to engines; an answer that is not streamed is held in memory once (a choice of 8,192 tokens with
20 logprobs each is 10 MB).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import aiohttp
from yarl import URL

from serving.gateway import body, stream
from serving.gateway.exchange import EVENTS, JSON, Exchange
from serving.gateway.fields import Asked
from serving.gateway.health import Health
from serving.gateway.metrics import Metrics
from serving.gateway.refusal import Refusal
from serving.gateway.routes import EngineGone, NoPlace, Place, PlaceEnded, Route
from serving.gateway.settings import Settings

CONNECT_SECONDS = 5
#: A connection that ends this soon after a request, without a byte of an answer, had been closed by the engine as idle.
#: One that ends later may have been ended by the request itself, which must not be tried on the next engine.
IDLE_CLOSE_SECONDS = 0.25
#: Engines keep idle connections for 600 s (serving/front.py): ours are dropped before.
KEEP_SECONDS = 60
#: A 404 with this header comes from the place, not from the engine (serving/front.py).
PLACE = "x-ray-ft-place"
RETRY_AFTER = (b"retry-after", b"5")
LONGEST_MESSAGE = 1000
_STREAM_HEADERS = (EVENTS, (b"x-accel-buffering", b"no"))  # nginx would hold tokens back
_CONTENT = {"Content-Type": "application/json"}


class Upstream:
    """The way to all engines.

    Args:
        settings: of the gateway.
        metrics: waiting and running requests, and times.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.health = Health(settings.stall_seconds, self.probe, metrics)
        self._waiting: dict[str, int] = {}
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            trust_env=False,  # engines are in the cluster: no proxy stands between
        )
        self.health.start()

    async def stop(self) -> None:
        await self.health.stop()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def answer(self, exchange: Exchange, path: str, asked: Asked, route: Route) -> None:
        """Ask the engine and pass its answer on. The exchange has the tokens afterwards, also when this raises.

        Raises:
            Refusal: the engine refused, cannot be reached or took too long; too many wait already.
        """
        payload = body.write(asked.body)
        metrics = self._metrics.model(route.name)
        failed = 0
        again = False
        while True:
            try:
                async with contextlib.AsyncExitStack() as held:
                    place = await self._place(held, route, again)
                    waited = time.monotonic() - exchange.began
                    held.enter_context(self._running(route))
                    # Until the engine says better, also where the client does not wait for that.
                    exchange.prompt_tokens, exchange.estimated = asked.prompt_estimate, True
                    response = await self._post(held, place, path, payload, exchange.id)
                    metrics.queue.observe(waited)
                    if response.status != 200:
                        exchange.prompt_tokens, exchange.estimated = 0, False
                        raise await _refusal(response)
                    if asked.stream:
                        await self._pass_events(exchange, asked, route, place, response, held)
                    else:
                        await self._pass_whole(exchange, route, response, held)
                return
            except PlaceEnded:
                exchange.prompt_tokens, exchange.estimated, again = 0, False, True
            except EngineGone as error:
                self.health.pulse(route.backend).suspect = True
                exchange.prompt_tokens, exchange.estimated = 0, False
                failed += 1
                if failed == 2:
                    raise _unreachable() from error
            except (aiohttp.ClientError, OSError) as error:
                self.health.pulse(route.backend).suspect = True
                raise Refusal(502, "the model's engine broke off; try again", "engine_failed") from error
            except NoPlace as error:
                self.health.pulse(route.backend).suspect = True
                raise _unreachable() from error

    @contextlib.contextmanager
    def _queue(self, route: Route, again: bool) -> Iterator[None]:
        """Count as waiting, or be refused, unless it has waited before."""
        name, gauge = route.backend.name, self._metrics.model(route.name).waiting
        waiting = self._waiting.get(name, 0)
        if waiting >= self._settings.max_waiting and not again:
            raise Refusal(
                503, f"{waiting} requests wait for this model already; try again later", "too_many_waiting",
                headers=[RETRY_AFTER],
            )  # fmt: skip
        self._waiting[name] = waiting + 1
        gauge.inc()
        try:
            yield
        finally:
            self._waiting[name] -= 1
            gauge.dec()

    @contextlib.contextmanager
    def _running(self, route: Route) -> Iterator[None]:
        """Count as holding a place."""
        pulse, gauge = self.health.pulse(route.backend), self._metrics.model(route.name).running
        pulse.running += 1
        gauge.inc()
        try:
            yield
        finally:
            pulse.running -= 1
            gauge.dec()

    async def _place(self, held: contextlib.AsyncExitStack, route: Route, again: bool) -> Place:
        with self._queue(route, again):
            return await held.enter_async_context(route.backend.place())

    async def _post(
        self, held: contextlib.AsyncExitStack, place: Place, path: str, payload: bytes, request_id: str
    ) -> aiohttp.ClientResponse:
        """The engine's answer up to its headers. When the stack ends before the answer did, the connection is closed,
        by which the engine learns that nobody wants the rest.

        Raises:
            EngineGone: the engine did not take the request.
            PlaceEnded: the engine does not know the place any more.
        """
        assert self._session is not None, "Gateway.start() was not awaited"
        asked = time.monotonic()
        try:
            response = await self._session.post(
                _url(place.url, path),
                data=payload,
                headers={**_CONTENT, "X-Request-Id": request_id, **place.headers},
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as error:
            raise EngineGone from error
        except (aiohttp.ServerDisconnectedError, ConnectionResetError) as error:
            if time.monotonic() - asked < IDLE_CLOSE_SECONDS:
                raise EngineGone from error
            raise
        held.callback(response.close)
        if response.status == 404 and PLACE in response.headers:
            raise PlaceEnded
        return response

    async def _pass_whole(
        self, exchange: Exchange, route: Route, response: aiohttp.ClientResponse, held: contextlib.AsyncExitStack
    ) -> None:
        content = await response.read()
        await held.aclose()  # the place is free, however slowly the client reads
        self.health.pulse(route.backend).well()
        exchange.prompt_tokens, exchange.answer_tokens = stream.usage(content) or (0, 0)
        exchange.estimated = False
        if route.engine_name != route.name:
            content = content.replace(stream.model_bytes(route.engine_name), stream.model_bytes(route.name), 1)
        await exchange.reply(200, content, [JSON])

    async def _pass_events(
        self,
        exchange: Exchange,
        asked: Asked,
        route: Route,
        place: Place,
        response: aiohttp.ClientResponse,
        held: contextlib.AsyncExitStack,
    ) -> None:
        """Pass a streamed answer on. The start is held until the first event: an error before it has a status."""
        events = stream.Events((route.engine_name, route.name), asked.usage)
        pulse, content, send = self.health.pulse(route.backend), response.content, exchange.send
        began = None
        try:
            while data := await content.readany():
                data = events.passed(data)
                if events.error is not None:
                    raise _engine_error(events.error)
                if not data:
                    continue
                exchange.last = time.monotonic()
                if began is None:
                    began = pulse.began(place.url)
                    exchange.first = exchange.last
                    await exchange.start(200, _STREAM_HEADERS)
                began.last = exchange.last
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if not events.done:
                raise aiohttp.ClientPayloadError("the stream ended before it was done")
            pulse.well()
            await held.aclose()
            if began is None:  # nothing but the usage was generated
                await exchange.start(200, _STREAM_HEADERS)
            await exchange.end()
        finally:
            if began is not None:
                pulse.ended(place.url)
            exchange.estimated = events.usage is None
            exchange.prompt_tokens, exchange.answer_tokens = events.usage or _sent(events.count, asked)

    async def probe(self, route: Route, asked: Callable[[bool], None]) -> None:
        """A request for one token, beside everything that is counted or limited.

        Args:
            asked: told whether the engine has been asked, or a place is waited for.

        Raises:
            Exception: the engine did not answer it.
        """
        content: dict[str, Any] = {"model": route.engine_name}
        if route.kind == "classify":
            path, content["input"] = "/v1/classify", "a"
        else:
            path, content["prompt"], content["max_tokens"] = "/v1/completions", "a", 1
        while True:
            asked(False)
            with contextlib.suppress(PlaceEnded):
                async with contextlib.AsyncExitStack() as held:
                    place = await held.enter_async_context(route.backend.place())
                    asked(True)
                    response = await self._post(held, place, path, json.dumps(content).encode(), "probe")
                    await response.read()
                    response.raise_for_status()
                    return


@lru_cache(256)
def _url(base: str, path: str) -> URL:
    return URL(base + path)


def _sent(events: int, asked: Asked) -> tuple[int, int]:
    """Tokens of an answer that was broken off: the prompt as estimated, and each event as one token.

    vLLM gives one event a token, more tokens in one only where the client reads too slowly; of a chat, the first event
    of each choice only says who speaks.
    """
    return asked.prompt_estimate, max(0, events - (asked.choices if "messages" in asked.body else 0))


def _unreachable() -> Refusal:
    return Refusal(503, "no engine of this model can be reached now; try again", "engine_unavailable",
                   headers=[RETRY_AFTER])  # fmt: skip


async def _refusal(response: aiohttp.ClientResponse) -> Refusal:
    """What the client is told of an answer that is an error."""
    content = await response.content.read(64 << 10)
    try:
        error = json.loads(content).get("error", {})
    except (ValueError, AttributeError, RecursionError):
        error = {}
    return _engine_error({"code": response.status, **(error if isinstance(error, dict) else {})}, response.status)


def _engine_error(error: dict[str, Any], status: int | None = None) -> Refusal:
    """An engine's error. Only those about the request itself are passed on: others may tell of the inside."""
    status = status or (error["code"] if isinstance(error.get("code"), int) else 500)
    message, param = error.get("message"), error.get("param")
    if status in (400, 413, 422) and isinstance(message, str):
        named = param if isinstance(param, str) else None
        return Refusal(400, message[:LONGEST_MESSAGE], "invalid_request", named)
    if status in (429, 503):
        return Refusal(503, "the model's engine is busy; try again", "engine_busy", headers=[RETRY_AFTER])
    return Refusal(502, "the model's engine failed to answer", "engine_failed")
