"""The gateway under uvicorn, with a fake engine behind: a request's whole way."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fake_engine as fake
import httpx
import pytest

from serving.gateway import Gateway, Settings, health, upstream
from serving.gateway.server import config

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "one two three"}]}


class Served:
    """A gateway over one engine, and a client with a key."""

    def __init__(self, base: str, engine: fake.Engine, backend: fake.Backend) -> None:
        self.base, self.engine, self.backend = base, engine, backend
        self.client = httpx.Client(base_url=base, headers=fake.HEADERS, timeout=20)

    def post(self, path: str = CHAT, **fields: Any) -> httpx.Response:
        return self.client.post(path, json={**BODY, **fields})

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.base}/metrics", headers=fake.ADMIN).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("ray_ft_gateway_"): float(value) for name, value in pairs}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[list[fake.Engine], str]]:
    """One server; the engine of each test takes the place of the one before."""
    current: list[fake.Engine] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await current[-1](scope, receive, send)

    with fake.serving(app) as url:
        yield current, url


@pytest.fixture
def engine(engines: tuple[list[fake.Engine], str]) -> fake.Engine:
    engines[0].append(fake.Engine())
    return engines[0][-1]


@pytest.fixture
def engine_url(engines: tuple[list[fake.Engine], str]) -> str:
    return engines[1]


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def served(engine: fake.Engine, engine_url: str, settings: Settings) -> Iterator[Served]:
    backend = fake.Backend(engine_url)
    examples = ({"prompt": "a", "reference": "b", "origin": "f:1"},)
    routes = [
        fake.route("demo", backend, engine_name="inside", compare="base", examples=examples),
        fake.route("base", backend),
        fake.route("labels", backend, kind="classify", chat=False),
        fake.route("text", backend, chat=False),
    ]
    with fake.gateway(routes, settings) as base:
        yield Served(base, engine, backend)


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def asked_by_hand(base: str) -> socket.socket:
    """A connection on which `BODY` has been sent; nothing waits for the answer."""
    body = json.dumps(BODY).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {fake.KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", httpx.URL(base).port or 0), 60)
    connection.sendall(head.encode() + body)
    return connection


def asked(engine: fake.Engine) -> list[tuple[str, dict[str, Any], dict[str, str]]]:
    """The requests that an engine had, probes aside."""
    return [each for each in engine.requests if each[2]["x-request-id"] != fake.PROBE]


def error(answer: httpx.Response) -> dict[str, Any]:
    content = answer.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "code", "param"}
    return content["error"]


# ------------------------------------------------------------------------------------------------------ what is asked


def test_an_answer(served: Served) -> None:
    answer = served.post()
    assert answer.status_code == 200
    content = answer.json()
    assert content["model"] == "demo"
    assert content["choices"][0]["message"]["content"] == "inside says: one two three "
    [(path, body, headers)] = asked(served.engine)
    assert (path, body["model"]) == (CHAT, "inside")
    assert headers["x-request-id"] == answer.headers["x-request-id"]
    assert fake.KEY not in str(headers)  # the client's key goes no further
    fake.wait_until(lambda: served.backend.held == 0)


def test_other_kinds_of_answers(served: Served) -> None:
    text = served.client.post(COMPLETIONS, json={"model": "text", "prompt": "a b", "max_tokens": 3}).json()
    assert text["choices"][0]["text"] == "text says: a "
    labels = served.client.post("/v1/classify", json={"model": "labels", "input": ["a", "b"]}).json()
    assert [each["label"] for each in labels["data"]] == ["good", "good"]
    assert error(served.client.post(CHAT, json={**BODY, "model": "text"}))["code"] == "wrong_path"
    assert error(served.client.post(CHAT, json={**BODY, "model": "labels"}))["code"] == "wrong_path"
    assert served.metrics()['prompt_tokens_total{key="test",model="labels"}'] == 2


@pytest.mark.parametrize("split", [False, True])
def test_a_stream(served: Served, split: bool) -> None:
    served.engine.split = split
    hidden = served.post(stream=True)
    shown = served.post(stream=True, stream_options={"include_usage": True})
    assert hidden.headers["content-type"].startswith("text/event-stream")
    for answer, with_usage in ((hidden, False), (shown, True)):
        pieces = events(answer.text)
        texts = [piece["choices"][0]["delta"]["content"] for piece in pieces if piece["choices"]]
        assert "".join(texts) == "inside says: one two three "
        assert {piece["model"] for piece in pieces} == {"demo"}
        assert [piece["usage"]["completion_tokens"] for piece in pieces if "usage" in piece] == [5] * with_usage
        assert answer.text.endswith("data: [DONE]\n\n")


def test_tokens_arrive_one_by_one(served: Served) -> None:
    served.engine.may = threading.Semaphore(0)
    with served.client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
        pieces, seen = answer.iter_text(), ""
        for word in ("inside ", "says: ", "one ", "two ", "three "):
            assert word not in seen
            served.engine.may.release()
            while word not in seen:  # the next token is given once this one has arrived
                seen += next(pieces)
        assert "[DONE]" in seen + "".join(pieces)


def test_models(served: Served) -> None:
    listed = served.client.get("/v1/models").json()
    assert listed["object"] == "list"
    first = listed["data"][0]
    assert (first["id"], first["object"], first["created"]) == ("demo", "model", 1_700_000_000)
    assert first["ray_ft"] == {
        "kind": "generate", "chat": True, "vision": False, "max_model_len": 512, "run": "demo", "step": 100,
        "base": "tiny", "compare": "base",
    }  # fmt: skip
    examples = served.client.get("/playground/examples?model=demo").json()
    assert examples == {"examples": [{"prompt": "a", "reference": "b", "origin": "f:1"}]}


def test_replaced_routes_are_used_at_once(engine: fake.Engine, engine_url: str) -> None:
    backend = fake.Backend(engine_url)
    app = Gateway(Settings(), fake.keys(), [fake.route("demo", backend, engine_name="old")])
    engine.rate = 20
    with fake.serving(app, lifespan="on") as base, httpx.Client(base_url=base, headers=fake.HEADERS) as client:
        with client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
            pieces = answer.iter_text()
            begun = next(pieces)
            app.replace([fake.route("demo", backend, engine_name="new")])
            rest = begun + "".join(pieces)
        assert "old " in rest
        assert "[DONE]" in rest
        assert "new says" in client.post(CHAT, json=BODY).text
        app.replace([])
        assert client.post(CHAT, json=BODY).status_code == 503, "as after a restart: try again"


def test_a_replaced_backend_is_forgotten(engine_url: str) -> None:
    """Else a dashboard would show for ever how it was when it was last used."""
    app = Gateway(Settings(), fake.keys(), [fake.route("demo", fake.Backend(engine_url, name="old"))])
    app._upstream.health.faults()
    assert b'healthy{backend="old"} 1.0' in app.metrics.text()
    app.replace([fake.route("demo", fake.Backend(engine_url, name="new"))])
    app._upstream.health.faults()
    assert b'backend="old"' not in app.metrics.text()
    assert b'healthy{backend="new"} 1.0' in app.metrics.text()


def test_stop_does_not_wait_for_what_it_refuses() -> None:
    """Clients whose requests are refused may ask again at once; only what had begun before is waited for."""

    async def main() -> None:
        app = Gateway(Settings(), fake.keys(), [])
        await app.start()
        app._under_way.add("begun")  # type: ignore[arg-type]
        stop = asyncio.create_task(app.stop())
        await asyncio.sleep(0.1)
        assert not stop.done()
        app._under_way.add("refused")  # type: ignore[arg-type]
        app._under_way.discard("begun")  # type: ignore[arg-type]
        await asyncio.wait_for(stop, 60)

    asyncio.run(main())


def test_two_routes_of_one_name() -> None:
    backend = fake.Backend("http://engine")
    with pytest.raises(ValueError, match="'demo'"):
        Gateway(Settings(), fake.keys(), [fake.route("demo", backend), fake.route("demo", backend)])


# ---------------------------------------------------------------------------------------------------- who may ask what


def test_without_a_key_nothing_is_told(served: Served) -> None:
    answers = [
        httpx.post(f"{served.base}{CHAT}", json={**BODY, "model": name}, headers=headers)
        for name in ("demo", "nothing")
        for headers in ({}, {"Authorization": "Bearer " + "x" * 30})
    ]
    assert [answer.status_code for answer in answers] == [401, 403, 401, 403]
    assert answers[0].content == answers[2].content
    assert answers[1].content == answers[3].content
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert not asked(served.engine)


def test_an_unknown_model(served: Served) -> None:
    answer = served.post(model="../demo")
    assert answer.status_code == 404
    assert error(answer)["code"] == "model_not_found"
    assert "base" not in answer.text


@pytest.mark.parametrize("settings", [Settings(open=True)])
def test_an_open_gateway_answers_to_its_own_name_only(served: Served) -> None:
    assert httpx.post(f"{served.base}{CHAT}", json=BODY).status_code == 200
    port = httpx.URL(served.base).port
    for host, status in (
        ("localhost:1", 200), ("[::1]:80", 200), ("evil.example.org", 421), (f"a:{port}", 421),
        ("127.0.0.1.example.org", 421), ("127.example.org:80", 421),  # names that may point to 127.0.0.1
    ):  # fmt: skip
        assert httpx.get(f"{served.base}/v1/models", headers={"Host": host}).status_code == status, host


@pytest.mark.parametrize("settings", [Settings(requests_per_minute=2)])
def test_the_limit_of_a_key(served: Served) -> None:
    answers = [served.post(), served.post(), served.post()]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert int(answers[2].headers["retry-after"]) > 20
    assert served.client.get("/v1/models").status_code == 200
    assert httpx.post(f"{served.base}{CHAT}", json=BODY, headers=fake.ADMIN).status_code == 200


def test_tokens_are_taken_as_they_were_used(engine: fake.Engine, engine_url: str) -> None:
    engine.tokens = ("a ",)
    app = Gateway(Settings(tokens_per_minute=1000), fake.keys(), [fake.route("demo", fake.Backend(engine_url))])
    app._limits._clock = lambda: 100.0  # nothing flows back meanwhile
    with fake.serving(app, lifespan="on") as base, httpx.Client(base_url=base, headers=fake.HEADERS) as client:
        for stream in (False, True):
            assert client.post(CHAT, json={**BODY, "max_tokens": 100, "stream": stream}).status_code == 200
        left = int(client.post(CHAT, json={**BODY, "max_tokens": 1}).headers["x-ratelimit-remaining-tokens"])
    # Twice 1 + 100 tokens were used; the third request's estimate is taken when its headers are made: 8 + 1.
    assert left == 1000 - 202 - 9


@pytest.mark.parametrize("settings", [Settings(cors_origins=("https://app.example.org",))])
def test_other_origins(served: Served) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours = served.client.options(CHAT, headers={"Origin": "https://app.example.org", **asks})
    assert ours.status_code == 204
    assert ours.headers["access-control-allow-origin"] == "https://app.example.org"
    assert "authorization" in ours.headers["access-control-allow-headers"]
    answer = served.client.post(CHAT, json=BODY, headers={"Origin": "https://app.example.org"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
    theirs = served.client.options(CHAT, headers={"Origin": "https://evil.example.org", **asks})
    assert theirs.status_code == 405
    assert "access-control-allow-origin" not in theirs.headers


def test_no_origin_is_allowed_by_default(served: Served) -> None:
    answer = served.client.post(CHAT, json=BODY, headers={"Origin": "https://app.example.org"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_method_that_is_not_offered(served: Served) -> None:
    answer = served.client.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_the_page(served: Served) -> None:
    assert httpx.get(f"{served.base}/playground").headers["location"] == "/playground/"
    page = httpx.get(f"{served.base}/playground/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{served.base}/playground/nothing.js").status_code == 404


# ------------------------------------------------------------------------------------------------- engines that fail


@pytest.mark.parametrize(
    ("status", "message", "answered", "said"),
    [
        (400, "This model's maximum context length is 8192 tokens", 400, "maximum context length"),
        (422, "wrong", 400, "wrong"),
        (500, "at /srv/models/x.py line 3", 502, "failed to answer"),
        (401, "Unauthorized", 502, "failed to answer"),
        (404, "The model `inside` does not exist", 502, "failed to answer"),
        (503, "busy", 503, "busy"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_error(served: Served, status: int, message: str, answered: int, said: str, stream: bool) -> None:
    served.engine.error = (status, {"error": {"message": message, "type": "X", "code": status, "param": None}})
    answer = served.post(stream=stream)
    assert answer.status_code == answered
    assert said in error(answer)["message"]
    assert "/srv" not in answer.text
    assert "inside" not in answer.text
    served.engine.error = None
    assert served.post().status_code == 200
    assert served.metrics()['prompt_tokens_total{key="test",model="demo"}'] == 1  # of the one that was answered


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"error": "text"}', b'{"error": {"message": 5}}', b""])
def test_an_engine_that_answers_nonsense(served: Served, content: bytes) -> None:
    served.engine.error = (400, content)
    assert served.post().status_code == 502


def test_an_engine_that_breaks_off(served: Served) -> None:
    served.engine.break_after = 2
    served.engine.rate = 100  # so that what came before the end is seen
    text = served.post(stream=True).text
    pieces = events(text)
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces[:-1]) == "inside says: "
    assert pieces[-1]["error"]["code"] == "engine_failed"
    assert "[DONE]" not in text
    assert served.metrics()['requests_total{key="test",model="demo",status="502"}'] == 1
    assert served.metrics()['answer_tokens_total{key="test",model="demo"}'] == 2
    assert served.backend.held == 0


def test_an_engine_that_takes_no_connection_is_passed_over(engine: fake.Engine, engine_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    backend = fake.Backend(engine_url, dead)
    with fake.gateway([fake.route("demo", backend)]) as base:
        answers = [httpx.post(f"{base}{CHAT}", json=BODY, headers=fake.HEADERS).status_code for _ in range(4)]
        assert answers == [200] * 4
        backend.urls = [dead]
        answer = httpx.post(f"{base}{CHAT}", json=BODY, headers=fake.HEADERS)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert dead[7:] not in answer.text
    assert backend.held == 0


def test_a_connection_that_the_engine_closed_as_idle(engine: fake.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "IDLE_CLOSE_SECONDS", 60.0)  # a busy machine may see it late
    with fake.serving(engine, timeout_keep_alive=1) as url:
        routes = [fake.route("demo", fake.Backend(url))]
        with fake.gateway(routes) as base:
            for pause in (1.0, 0.0):  # just when the engine closes it
                assert httpx.post(f"{base}{CHAT}", json=BODY, headers=fake.HEADERS).status_code == 200
                time.sleep(pause)


def test_a_client_that_goes_amid_a_stream(served: Served) -> None:
    served.engine.rate = 20
    served.engine.tokens = ("a ",)
    with served.client.stream("POST", CHAT, json={**BODY, "stream": True, "max_tokens": 400}) as answer:
        pieces = answer.iter_raw()
        for _ in range(4):
            next(pieces)
    fake.wait_until(lambda: served.engine.cancelled == 1)  # the engine was told
    fake.wait_until(lambda: served.backend.held == 0)
    metrics = served.metrics()
    assert metrics['requests_total{key="test",model="demo",status="499"}'] == 1
    # What was sent: as much as was read, and no more than the engine gave until it was told.
    assert 2 <= metrics['answer_tokens_total{key="test",model="demo"}'] <= served.engine.given < 400
    assert metrics['prompt_tokens_total{key="test",model="demo"}'] == 8  # 13 characters, estimated
    assert metrics['running{model="demo"}'] == 0


def test_a_client_that_goes_before_its_answer(served: Served) -> None:
    served.engine.stall_after = 0
    with asked_by_hand(served.base):
        fake.wait_until(lambda: asked(served.engine))
    fake.wait_until(lambda: served.engine.cancelled == 1)
    fake.wait_until(lambda: served.metrics().get('prompt_tokens_total{key="test",model="demo"}') == 8)


@pytest.mark.parametrize("settings", [Settings(timeout_seconds=3)])  # it has to begin within it
def test_an_answer_that_takes_too_long(served: Served) -> None:
    served.engine.stall_after = 2
    assert served.post().status_code == 504
    pieces = events(served.post(stream=True).text)
    assert pieces[-1]["error"]["code"] == "timeout"
    fake.wait_until(lambda: served.engine.cancelled == 2)
    fake.wait_until(lambda: served.backend.held == (served.engine.running > 0))  # a probe may hold a place


@pytest.mark.parametrize("settings", [Settings(max_waiting=1)])
def test_too_many_waiting(engine: fake.Engine, engine_url: str, settings: Settings) -> None:
    backend = fake.Backend(engine_url, places=1)
    engine.may = threading.Semaphore(0)
    with (
        fake.gateway([fake.route("demo", backend)], settings) as base,
        httpx.Client(base_url=base, headers=fake.HEADERS, timeout=60) as client,
        client.stream("POST", CHAT, json={**BODY, "stream": True}) as first,
    ):
        pieces = first.iter_raw()
        next(pieces)
        with asked_by_hand(base) as second:
            fake.wait_until(lambda: backend.asked > backend.taken)  # the second waits
            third = httpx.post(f"{base}{CHAT}", json=BODY, headers=fake.HEADERS)
            assert (third.status_code, error(third)["code"]) == (503, "too_many_waiting")
            assert third.headers["retry-after"] == "5"
            engine.may.release(10)
            list(pieces)
            assert second.recv(100).startswith(b"HTTP/1.1 200")


def test_a_stopping_gateway_finishes_what_is_under_way(engine: fake.Engine, engine_url: str) -> None:
    engine.rate = 20
    app = Gateway(Settings(), fake.keys(), [fake.route("demo", fake.Backend(engine_url))])
    asked: dict[str, Any] = {"json": {**BODY, "stream": True}, "headers": fake.HEADERS}
    with fake.serving(app, lifespan="on") as base, httpx.stream("POST", f"{base}{CHAT}", **asked) as answer:
        pieces = answer.iter_text()
        next(pieces)
        app._stopping = True  # as stop() does first
        assert httpx.get(f"{base}/health").status_code == 503
        assert "[DONE]" in "".join(pieces)


# ------------------------------------------------------------------------------------------------------------- health


@pytest.mark.parametrize("settings", [Settings(stall_seconds=0.4)])
def test_health_names_the_model_that_stalls(served: Served) -> None:
    fake.wait_until(lambda: httpx.get(f"{served.base}/health").json() == {"status": "ok"})
    served.engine.stall_after = 1
    with served.client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
        pieces = answer.iter_raw()  # kept: the connection ends with it
        next(pieces)
        fake.wait_until(lambda: httpx.get(f"{served.base}/health").status_code == 503)
        assert "demo" in error(httpx.get(f"{served.base}/health"))["message"]
    served.engine.stall_after = None
    fake.wait_until(lambda: httpx.get(f"{served.base}/health").status_code == 200)
    fake.wait_until(lambda: served.metrics()['healthy{backend="fake"}'] == 1)


@pytest.mark.parametrize("settings", [Settings(stall_seconds=0.4)])
def test_health_without_requests(served: Served) -> None:
    """An engine that nobody asks is probed."""
    served.engine.stall_after = 0
    fake.wait_until(lambda: httpx.get(f"{served.base}/health").status_code == 503)
    served.engine.stall_after = None
    served.engine.error = (500, b"")
    fake.wait_until(lambda: "failed" in httpx.get(f"{served.base}/health").text)
    served.engine.error = None
    fake.wait_until(lambda: httpx.get(f"{served.base}/health").status_code == 200)


def test_silence_of_a_whole_answer_is_no_stall(
    engine: fake.Engine, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = 0.0  # of the clock by which silence is measured
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead))
    backend = fake.Backend(engine_url)
    app = Gateway(Settings(stall_seconds=16), fake.keys(), [fake.route("demo", backend)])
    pulse = app._upstream.health.pulse(backend)

    def well(probes: int) -> bool:
        """Whether so many probes were answered, and none is under way."""
        return len(engine.requests) - len(asked(engine)) == probes and pulse.probe is not None and pulse.probe.done()

    with fake.serving(app, lifespan="on") as base:
        fake.wait_until(lambda: well(1))
        engine.may = threading.Semaphore(0)
        with asked_by_hand(base) as connection:
            fake.wait_until(lambda: asked(engine))
            ahead = 1000.0
            assert httpx.get(f"{base}/health").status_code == 200
            fake.wait_until(lambda: well(2))  # the probe told
            assert httpx.get(f"{base}/health").status_code == 200
            engine.may.release(5)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        with httpx.stream("POST", f"{base}{CHAT}", json={**BODY, "stream": True}, headers=fake.HEADERS) as answer:
            pieces = answer.iter_raw()  # kept: the connection ends with it
            next(pieces)  # a stream that has begun and is silent is one
            ahead = 2000.0
            assert httpx.get(f"{base}/health").status_code == 503


def test_probes_wake_nothing() -> None:
    with fake.serving(engine := fake.Engine()) as url:
        backend = fake.Backend(url, asleep=True)
        with fake.gateway([fake.route("demo", backend)], Settings(stall_seconds=0.2)) as base:
            time.sleep(0.6)
            assert httpx.get(f"{base}/health").status_code == 200
            assert (backend.woken, engine.requests) == (0, [])
            assert httpx.post(f"{base}{CHAT}", json=BODY, headers=fake.HEADERS).status_code == 200
            assert backend.woken == 1


# ------------------------------------------------------------------------------------------------- what is written down


def test_metrics_and_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray_ft.gateway.access")
    served.post()
    served.post(stream=True, n=2)
    served.post(model="nothing")
    metrics = served.metrics()
    assert metrics['requests_total{key="test",model="demo",status="200"}'] == 2
    assert metrics['refused_total{status="404"}'] == 1
    assert metrics['prompt_tokens_total{key="test",model="demo"}'] == 2
    assert metrics['answer_tokens_total{key="test",model="demo"}'] == 15
    assert metrics['time_to_first_token_seconds_count{model="demo"}'] == 1
    assert metrics['time_per_output_token_seconds_count{model="demo"}'] == 1
    assert metrics['request_seconds_count{model="demo"}'] == 2
    assert metrics['queue_seconds_count{model="demo"}'] == 2
    assert metrics['waiting{model="demo"}'] == metrics['running{model="demo"}'] == 0
    lines = [json.loads(record.message) for record in caplog.records if record.name == "ray_ft.gateway.access"]
    asked = [line for line in lines if line["path"] == CHAT]
    shown = ("key", "model", "status", "prompt_tokens", "answer_tokens")
    assert [tuple(line[name] for name in shown) for line in asked] == [
        ("test", "demo", 200, 1, 5), ("test", "demo", 200, 1, 10), ("test", "", 404, 0, 0),
    ]  # fmt: skip
    assert asked[0]["ttft"] is None
    assert 0 < asked[1]["ttft"] <= asked[1]["seconds"]
    assert fake.KEY not in caplog.text
    assert "one two" not in caplog.text


def test_the_servers_settings_can_be_replaced() -> None:
    made = config(lambda: None, port=1234, limit_concurrency=5)
    assert (made.port, made.limit_concurrency, made.access_log) == (1234, 5, False)
