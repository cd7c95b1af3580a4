"""An engine without a model, that speaks as vLLM's HTTP server does, and backends and servers to test the gateway with.

    with fake.serving(engine := fake.Engine()) as url, fake.gateway([fake.route("demo", fake.Backend(url))]) as base:
        httpx.post(f"{base}/v1/chat/completions", …)

The engine's bytes are vLLM's: the order of fields, no spaces, one event a token, the usage in an event of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from serving.gateway import Gateway, Keys, Place, Route, Settings
from serving.gateway.server import config

KEY = "test-key-of-sixteen-or-more"
ADMIN_KEY = "test-admin-of-sixteen-or-more"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
LABELS = ("good", "bad")
SECRET = "engine-secret"
PROBE = "probe"  # the gateway's name for requests of its own


@dataclass
class Engine:
    """An ASGI application. Attributes may be changed while it serves.

    Attributes:
        tokens: texts of an answer, given as many times over as `max_tokens` has room; None: the model's name and the
            words of the prompt.
        rate: tokens a second of each choice; 0: as fast as it goes.
        first: seconds before the first token.
        error: (status, body) of every answer; None: no error.
        stall_after: tokens after which nothing more comes; None: never.
        break_after: tokens after which the connection ends; None: never.
        split: write every event in two halves.
        may: released once for each token that may be given, those of probes aside; None: all may.
        secret: what x-engine-secret has to be; others get 401.
        requests: (path, body, headers) of what came.
        cancelled: requests whose client went away before their end.
        given: tokens of streams that were sent.
    """

    tokens: tuple[str, ...] | None = None
    rate: float = 0.0
    first: float = 0.0
    error: tuple[int, Any] | None = None
    stall_after: int | None = None
    break_after: int | None = None
    split: bool = False
    may: threading.Semaphore | None = None
    secret: str = SECRET
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    cancelled: int = 0
    given: int = 0
    running: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = json.loads(content)
        self.requests.append((scope["path"], body, headers))
        self.running += 1
        answer = asyncio.create_task(self._answer(scope["path"], body, headers, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.cancelled += 1
            else:
                answer.result()
        finally:
            answer.cancel()
            gone.cancel()
            self.running -= 1

    async def _answer(self, path: str, body: dict[str, Any], headers: Mapping[str, str], send: Any) -> None:
        if headers.get("x-engine-secret") != self.secret:
            await _reply(send, 401, {"error": "Unauthorized"})
            return
        if self.error is not None:
            await _reply(send, *self.error)
            return
        if path == "/v1/classify":
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [{"label": LABELS[0], "probabilities": {LABELS[0]: 0.75, LABELS[1]: 0.25}} for _ in texts]
            usage = {"prompt_tokens": len(texts), "total_tokens": len(texts), "completion_tokens": 0}
            await _reply(send, 200, {"object": "list", "model": body["model"], "data": data, "usage": usage})
            return
        chat = path == "/v1/chat/completions"
        words = self._words(body, chat)
        prompt = body["messages"] if chat else body["prompt"]
        count, n = (len(prompt) if isinstance(prompt, list) else len(str(prompt).split())), body.get("n", 1)
        used = {"prompt_tokens": count, "total_tokens": count + n * len(words), "completion_tokens": n * len(words)}
        if body.get("stream"):
            await self._stream(send, body, headers["x-request-id"], chat, words, n, used)
            return
        if self.stall_after is not None:
            await asyncio.sleep(3600)
        for _ in words:
            await self._allowed(headers["x-request-id"])
        await asyncio.sleep(self.first + (len(words) / self.rate if self.rate else 0))
        text = "".join(words)
        kept: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [{"index": i, **kept, "logprobs": None, "finish_reason": "length"} for i in range(n)]
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": f"{'chat' if chat else ''}cmpl-{headers['x-request-id']}", "object": kind, "created": 1}
        await _reply(send, 200, {**head, "model": body["model"], "choices": choices, "usage": used})

    async def _allowed(self, name: str) -> None:
        """Wait until one token more may be given."""
        while self.may is not None and name != PROBE and not self.may.acquire(blocking=False):
            await asyncio.sleep(0.002)

    def _words(self, body: dict[str, Any], chat: bool) -> list[str]:
        most = body.get("max_completion_tokens", body.get("max_tokens", 64))
        if self.tokens is not None:
            return [self.tokens[i % len(self.tokens)] for i in range(most)]
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        if isinstance(asked, list):
            asked = " ".join(part.get("text", "(image)") if isinstance(part, dict) else str(part) for part in asked)
        return [f"{word} " for word in f"{body['model']} says: {asked}".split()][:most]

    async def _stream(
        self, send: Any, body: dict[str, Any], name: str, chat: bool, words: Sequence[str], n: int, used: dict[str, int]
    ) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": f"{'chat' if chat else ''}cmpl-{name}", "object": kind, "created": 1, "model": body["model"]}
        await _start(send, 200, b"text/event-stream; charset=utf-8")

        async def event(content: Any) -> None:
            data = b"data: " + (content if isinstance(content, bytes) else _json(content)) + b"\n\n"
            for part in (data[:20], data[20:]) if self.split else (data,):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                if self.split:
                    await asyncio.sleep(0.001)

        if chat:
            for i in range(n):
                delta = {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                await event({**head, "choices": [{**delta, "finish_reason": None}]})
        began = time.monotonic() + self.first
        for at, word in enumerate(words):
            if at == self.stall_after:
                await asyncio.sleep(3600)
            if at == self.break_after:
                raise ConnectionError("the fake engine breaks off")  # uvicorn closes the connection
            await self._allowed(name)
            if self.rate or self.first:
                await asyncio.sleep(max(0.0, began + (at / self.rate if self.rate else 0) - time.monotonic()))
            elif at % 16 == 15:
                await asyncio.sleep(0)
            end = "length" if at == len(words) - 1 else None
            for i in range(n):
                piece: dict[str, Any] = {"delta": {"content": word}} if chat else {"text": word}
                choice = {"index": i, **piece, "logprobs": None, "finish_reason": end, "token_ids": None}
                await event({**head, "choices": [choice]})
                self.given += 1
        if (body.get("stream_options") or {}).get("include_usage"):
            await event({**head, "choices": [], "usage": used})
        await event(b"[DONE]")
        await send({"type": "http.response.body"})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


async def _start(send: Any, status: int, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})


async def _reply(send: Any, status: int, content: Any) -> None:
    await _start(send, status, b"application/json")
    await send({"type": "http.response.body", "body": content if isinstance(content, bytes) else _json(content)})


class Backend:
    """Places on engines, in turn.

    Args:
        urls: of the engines; may be changed.
        places: requests at once; None: any number.
        asleep: scaled to zero: a place wakes it after `wake` seconds.
    """

    def __init__(self, *urls: str, name: str = "fake", places: int | None = None, asleep: bool = False) -> None:
        self.name, self.urls, self.asleep, self.woken = name, list(urls), asleep, 0
        self.wake = 0.05
        self.asked = self.held = self.taken = 0  # places: asked for, held now, ever given
        self._free = None if places is None else asyncio.Semaphore(places)

    def awake(self) -> bool:
        return not self.asleep

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        self.asked += 1
        async with self._free or contextlib.nullcontext():
            if self.asleep:
                self.woken += 1
                await asyncio.sleep(self.wake)
                self.asleep = False
            self.held += 1
            self.taken += 1
            try:
                yield Place(self.urls[self.taken % len(self.urls)], {"x-engine-secret": SECRET})
            finally:
                self.held -= 1


def route(name: str, backend: Any, **fields: Any) -> Route:
    """A route of a model that sees nothing and chats; ``engine_name`` is the name unless said otherwise."""
    given = {
        "engine_name": name, "kind": "generate", "max_model_len": 512, "chat": True, "vision": False,
        "details": {"run": name, "step": 100, "base": "tiny", "created": 1_700_000_000},
    }  # fmt: skip
    return Route(name=name, backend=backend, **{**given, **fields})


def keys(file: str | None = None) -> Keys:
    return Keys(Keys.parse_env(f"test:{KEY},admin:{ADMIN_KEY}"), file)


@contextlib.contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """An ASGI application under uvicorn, in a thread. Yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    quiet = {"lifespan": "off", "log_level": "critical", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(config(app, **{**quiet, **options}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@contextlib.contextmanager
def gateway(routes: Sequence[Route], settings: Settings | None = None, api_keys: Keys | None = None) -> Iterator[str]:
    """The real gateway over these routes. Yields its address; keys are `KEY` and `ADMIN_KEY`."""
    app = Gateway(settings or Settings(), api_keys or keys(), routes)
    with serving(app, lifespan="on") as url:
        yield url


def wait_until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.005)
