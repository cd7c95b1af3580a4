"""The ASGI application: which path leads where, and a request's way through the gateway.

Limits: one process; behind several, each counts limits and metrics for itself. Clients speak HTTP/1.1, in clear: for
TLS, and for many slow clients, put a proxy in front.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence

from ray_ft.hosts import is_loopback
from serving.gateway import body, cors, fields, log
from serving.gateway.exchange import Disconnected, Exchange, Receive, Scope, Send
from serving.gateway.keys import Client, Keys
from serving.gateway.limits import ANSWER_ESTIMATE, Limits
from serving.gateway.metrics import Metrics
from serving.gateway.refusal import Refusal, shown
from serving.gateway.routes import Route, by_name
from serving.gateway.settings import Settings
from serving.gateway.static import Static
from serving.gateway.upstream import RETRY_AFTER, Upstream

logger = logging.getLogger("ray_ft.gateway")

#: Who asks where no key is asked for.
ANYONE = Client("anyone", admin=True)
ONE_MODEL = "/v1/models/"
#: Longest wait in `stop` for requests that are under way, in seconds.
DRAIN_SECONDS = 30


class Gateway:
    """An ASGI application in front of the engines of several models.

    Args:
        settings: who may ask, what, and how much.
        keys: API keys by name.
        routes: the models.

    Raises:
        ValueError: two routes have the same name.
    """

    def __init__(self, settings: Settings, keys: Keys, routes: Sequence[Route]) -> None:
        self._settings, self._keys = settings, keys
        self.metrics = Metrics()
        self._limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self._upstream = Upstream(settings, self.metrics)
        self._static = Static() if settings.playground else None
        self._stopping = False
        self._under_way: set[Exchange] = set()
        self._offered: dict[str, tuple[str, Callable[[Exchange], Awaitable[None]]]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics_text),
            "/v1/models": ("GET", self._models),
            **dict.fromkeys(fields.OFFERED, ("POST", self._ask)),
        }
        if self._static is not None:
            self._offered["/playground"] = ("GET", _to_playground)
            self._offered["/playground/examples"] = ("GET", self._examples)
        self.replace(routes)

    def replace(self, routes: Sequence[Route]) -> None:
        """Other models, for requests from now on; those under way keep theirs.

        Raises:
            ValueError: two routes have the same name.
        """
        self._routes = by_name(tuple(routes))
        self._upstream.health.watch(routes)

    async def start(self) -> None:
        """Open the HTTP client and begin to probe."""
        await self._upstream.start()
        self._stopping = False

    async def stop(self) -> None:
        """Refuse what comes from now on, and end once what is under way has been answered, or after 30 s."""
        self._stopping = True
        begun = set(self._under_way)  # not what is refused from now on: clients that ask again and again keep none up
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while begun & self._under_way:
                    await asyncio.sleep(0.05)
        await self._upstream.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(Exchange(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    # ------------------------------------------------------------------------------------------- a request's way

    async def _http(self, exchange: Exchange) -> None:
        """Answer one request, whatever happens, and write it down."""
        self._under_way.add(exchange)
        try:
            if self._stopping:
                raise Refusal(503, "this endpoint is stopping", "stopping", headers=[RETRY_AFTER], close=True)
            if cors.checked(exchange, self._settings.cors_origins):
                await cors.answer_preflight(exchange)
                return
            method, handler = self._found(exchange.path)
            if exchange.method != method:
                raise Refusal(
                    405, f"use {method}", "method_not_allowed", headers=[(b"allow", method.encode())], close=True
                )
            await handler(exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except Disconnected:
            exchange.status = log.GONE
        except Exception:
            logger.exception("request %s failed", exchange.id)
            await exchange.refuse(Refusal(500, "the gateway failed; its log has the request's id", "internal_error"))
        finally:
            self._under_way.discard(exchange)
            if not exchange.model and exchange.status >= 400:
                self.metrics.refused(exchange.status)
            log.line(exchange)

    async def _ask(self, exchange: Exchange) -> None:
        """A request to a model: who, how large, what, how often; then the engine's answer."""
        client = self._client(exchange)
        _check_kind_of_body(exchange)
        length = exchange.headers.get(b"content-length")
        settings = self._settings
        content = body.parse(await body.read(exchange.receive, length, settings.max_body_bytes, settings.body_seconds))
        route = self._route(content.get("model"), exchange.path)
        exchange.model = route.name
        asked = fields.check(exchange.path, content, settings, route)
        await self._answer(exchange, client, route, asked)

    async def _answer(self, exchange: Exchange, client: Client, route: Route, asked: fields.Asked) -> None:
        """The engine's answer, within the key's limits and the time, and counted whatever comes of it."""
        estimate = asked.prompt_estimate + min(asked.answer_most, ANSWER_ESTIMATE * asked.choices)
        seconds, status = self._settings.timeout_seconds, log.GONE
        admitted = False
        try:
            self._limits.admit(client.name, estimate)
            admitted = True
            exchange.extra += self._limits.headers(client.name)
            async with exchange.while_connected(), asyncio.timeout(seconds):
                await self._upstream.answer(exchange, exchange.path, asked, route)
            status = 200
        except TimeoutError:
            status = 504
            raise Refusal(504, f"the answer took longer than {seconds:g} s", "timeout") from None
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            if admitted:
                self._limits.settle(client.name, estimate, exchange.prompt_tokens + exchange.answer_tokens)
            self._count(exchange, client, route, asked, status)

    def _count(self, exchange: Exchange, client: Client, route: Route, asked: fields.Asked, status: int) -> None:
        metrics = self.metrics.model(route.name)
        metrics.answered(client.name, status)
        metrics.tokens(client.name, exchange.prompt_tokens, exchange.answer_tokens)
        if status == 200:
            metrics.whole.observe(time.monotonic() - exchange.began)
        if exchange.first:
            metrics.first_token.observe(exchange.first - exchange.began)
            later = exchange.answer_tokens / asked.choices - 1
            if later > 0:
                metrics.per_token.observe((exchange.last - exchange.first) / later)

    def _found(self, path: str) -> tuple[str, Callable[[Exchange], Awaitable[None]]]:
        found = self._offered.get(path)
        if path.startswith(ONE_MODEL):
            found = ("GET", self._model)
        if found is None and self._static is not None and path in self._static:
            found = ("GET", self._static.answer)
        if found is None:
            raise Refusal(404, "there is nothing at this path", "not_found", close=True)
        return found

    def _client(self, exchange: Exchange) -> Client:
        """Who asks.

        Raises:
            Refusal: 401 or 403; 421 where no key is asked for and the request means another host than this machine.
        """
        if self._settings.open:
            # A page of a stranger can make its own host name point to 127.0.0.1; the browser then lets it read here.
            host = exchange.headers.get(b"host", b"").decode("latin-1").rpartition(":")
            name = (host[0] if host[2].isdigit() else "".join(host)).strip("[]").lower()
            if not is_loopback(name):
                raise Refusal(421, "this endpoint answers to this machine's own name only", "wrong_host", close=True)
            client = ANYONE
        else:
            authorization = exchange.headers.get(b"authorization")
            try:
                client = self._keys.client(None if authorization is None else authorization.decode("latin-1"))
            except Refusal as refusal:
                refusal.headers.append((b"connection", b"close"))  # the body is not read
                raise
        exchange.key = client.name
        return client

    def _route(self, name: object, path: str) -> Route:
        route = self._routes.get(name) if isinstance(name, str) else None
        if not isinstance(name, str):
            raise Refusal(400, "the field 'model' is missing, or is not a text", "missing_field", "model")
        if not self._routes:  # just started, or started again: clients should try again
            raise Refusal(503, "no model is served yet", "starting", headers=[RETRY_AFTER])
        if route is None:
            raise Refusal(
                404, f"there is no model {shown(name)} here; GET /v1/models lists those that are", "model_not_found",
                "model",
            )  # fmt: skip
        if (path == "/v1/classify") != (route.kind == "classify"):
            offered = "/v1/classify" if route.kind == "classify" else "/v1/chat/completions and /v1/completions"
            raise Refusal(400, f"the model {name!r} is asked at {offered}", "wrong_path", "model")
        if path == "/v1/chat/completions" and not route.chat:
            raise Refusal(
                400, f"the model {name!r} has no chat template: ask it at /v1/completions", "wrong_path", "model"
            )
        return route

    # --------------------------------------------------------------------------------------------- other paths

    async def _health(self, exchange: Exchange) -> None:
        faults = self._upstream.health.faults()
        if not self._routes:
            raise Refusal(503, "no model is served yet", "starting", headers=[RETRY_AFTER])
        if faults:
            said = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
            raise Refusal(503, said, "unhealthy")
        await exchange.json({"status": "ok"})

    async def _metrics_text(self, exchange: Exchange) -> None:
        if not self._client(exchange).admin:
            raise Refusal(403, "this API key is not valid here", "invalid_api_key")
        await exchange.reply(200, self.metrics.text(), [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])

    async def _models(self, exchange: Exchange) -> None:
        self._client(exchange)
        await exchange.json({"object": "list", "data": [route.listed() for route in self._routes.values()]})

    async def _model(self, exchange: Exchange) -> None:
        self._client(exchange)
        name = exchange.path.removeprefix(ONE_MODEL)
        if name not in self._routes:
            raise Refusal(404, f"there is no model {shown(name)} here", "model_not_found", "model")
        await exchange.json(self._routes[name].listed())

    async def _examples(self, exchange: Exchange) -> None:
        self._client(exchange)
        try:
            query = urllib.parse.parse_qs(exchange.query.decode("latin-1"), max_num_fields=10)
        except ValueError:
            raise Refusal(400, "the address has too many parameters", "invalid_query") from None
        name = query.get("model", [""])[0]
        route = self._routes.get(name)
        if route is None:
            raise Refusal(404, f"there is no model {shown(name)} here", "model_not_found", "model")
        await exchange.json({"examples": [dict(example) for example in route.examples]})


async def _to_playground(exchange: Exchange) -> None:
    await exchange.reply(308, b"", [(b"location", b"/playground/")])


def _check_kind_of_body(exchange: Exchange) -> None:
    """Only plain JSON: a browser sends any other kind across origins without asking first.

    Raises:
        Refusal: 415.
    """
    kind = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refusal(415, "Content-Type has to be application/json", "unsupported_media_type", close=True)
    if exchange.headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "a compressed body is not accepted", "unsupported_media_type", close=True)
