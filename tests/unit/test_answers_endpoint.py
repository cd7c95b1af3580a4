"""Answers over HTTP: order, bounded requests, what is tried again and what is not, and the key."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ft import answers
from ray_ft.answers import Answer, Prompt, Sampling, Target, endpoint
from ray_ft.errors import ModelError, ServeError
from tests.unit import fake_openai
from tests.unit.fake_openai import Fake

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    for name in ("RAY_FT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with fake_openai.running() as server:
        yield server


def ask(fake: Fake, *prompts: Prompt, at_once: int = 4, sampling: Sampling | None = None) -> list[Answer]:
    with answers.opened(Target.of(fake.url), batch_size=at_once) as engine:
        return list(engine.answers(prompts, sampling or Sampling()))


def test_chat_and_text_in_order(fake: Fake) -> None:
    found = ask(fake, Prompt(messages=[{"role": "user", "content": "hello"}]), Prompt(text="plain"))
    assert found == [Answer("<hello>", "stop", 5, 3), Answer("<plain>", "stop", 5, 3)]
    by_prompt = dict(zip(fake.asked, fake.bodies, strict=True))
    assert by_prompt["hello"]["messages"] == [{"role": "user", "content": "hello"}]
    assert by_prompt["plain"]["model"] == "tiny"


def test_sampling_is_sent(fake: Fake) -> None:
    ask(fake, Prompt(text="a"), sampling=Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3))
    body = fake.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (7, 0.5, 0.9, 3)


def test_requests_run_at_once_but_no_more_than_asked_for(fake: Fake) -> None:
    fake.seconds = 0.05
    prompts = [Prompt(text=str(number)) for number in range(24)]
    assert [one.text for one in ask(fake, *prompts, at_once=3)] == [f"<{number}>" for number in range(24)]
    assert 2 <= fake.most <= 3


def test_prompts_are_read_as_they_are_needed(fake: Fake) -> None:
    read = []

    def endless() -> Iterator[Prompt]:
        for number in itertools.count():
            read.append(number)
            yield Prompt(text=str(number))

    with answers.opened(Target.of(fake.url), batch_size=2) as engine:
        assert [a.text for a in itertools.islice(engine.answers(endless(), Sampling()), 5)] == [
            f"<{number}>" for number in range(5)
        ]
    assert len(read) <= 5 + 2 * 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(fake: Fake, status: int) -> None:
    fake.reply = lambda prompt, attempt: fake_openai.error(status, "busy") if attempt <= 2 else None
    assert ask(fake, Prompt(text="a"), Prompt(text="b")) == [Answer("<a>", "stop", 1, 3), Answer("<b>", "stop", 1, 3)]
    assert sorted(fake.asked) == ["a"] * 3 + ["b"] * 3


def test_the_server_says_how_long_to_wait(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waits.append))  # nobody else's
    fake.reply = lambda prompt, attempt: fake_openai.error(429, "busy", {"Retry-After": "7"}) if attempt == 1 else None
    assert ask(fake, Prompt(text="a"))[0].text == "<a>"
    assert len(waits) == 1 and 7 <= waits[0] < 7.1


def test_what_does_not_pass_ends_the_batch(fake: Fake) -> None:
    fake.reply = lambda prompt, attempt: fake_openai.error(503, "no replica") if prompt == "b" else None
    with pytest.raises(ServeError, match=f"still answers 503 after {endpoint.ATTEMPTS} attempts: no replica"):
        ask(fake, Prompt(text="a"), Prompt(text="b"))
    assert fake.asked.count("b") == endpoint.ATTEMPTS


def test_a_refused_prompt_is_an_answer_with_an_error(fake: Fake) -> None:
    fake.reply = lambda prompt, attempt: fake_openai.error(400, "400 tokens are too many") if prompt == "b" else None
    found = ask(fake, Prompt(text="a"), Prompt(text="b"), Prompt(text="c"))
    assert [one.finish for one in found] == ["stop", "error", "stop"]
    assert found[1].error == "the server refused it (400): 400 tokens are too many"
    assert fake.asked.count("b") == 1


def test_the_key_is_sent_and_never_shown(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = SECRET
    monkeypatch.setenv("RAY_FT_API_KEY", SECRET)
    assert ask(fake, Prompt(text="a"))[0].text == "<a>"
    monkeypatch.setenv("RAY_FT_API_KEY", SECRET[:-1])
    with pytest.raises(ServeError, match="the key in RAY_FT_API_KEY is refused") as caught:
        ask(fake, Prompt(text="a"))
    assert SECRET[:-1] not in str(caught.value)


def test_without_a_key_none_is_sent(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)  # another server's: not for whoever answers at this address
    assert ask(fake, Prompt(text="a"))[0].text == "<a>"
    assert "Authorization" not in fake.headers[0] and SECRET not in str(fake.headers)
    fake.key = "other"
    with pytest.raises(ServeError, match="answers 401: no key was sent: RAY_FT_API_KEY is empty"):
        ask(fake, Prompt(text="a"))


def test_a_key_that_expires_under_way_ends_the_batch(fake: Fake) -> None:
    fake.reply = lambda prompt, attempt: fake_openai.error(403, "gone") if prompt == "b" else None
    with pytest.raises(ServeError, match="403"):
        ask(fake, Prompt(text="a"), Prompt(text="b"))


def test_the_model_must_be_named_where_there_are_several(fake: Fake) -> None:
    fake.models = ["one", "two"]
    with pytest.raises(ServeError, match=r"serves 2 models: one, two\n.*--model"):
        ask(fake, Prompt(text="a"))
    with answers.opened(Target.of(fake.url, "two")) as engine:
        assert next(engine.answers([Prompt(text="a")], Sampling())).text == "<a>"
    assert fake.bodies[0]["model"] == "two"
    fake.models = []
    with pytest.raises(ServeError, match="serves 0 models: none"):
        ask(fake, Prompt(text="a"))


def test_an_unknown_model(fake: Fake) -> None:
    fake.reply = lambda prompt, attempt: fake_openai.error(404, "no model 'x'")
    with (
        answers.opened(Target.of(fake.url, "x")) as engine,
        pytest.raises(ServeError, match=r"no such model or path: no model 'x'[\s\S]*--model"),
    ):
        next(engine.answers([Prompt(text="a")], Sampling()))


def test_what_is_no_such_api_is_said(fake: Fake) -> None:
    class Site(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    try:
        with (
            pytest.raises(ServeError, match=r"is not OpenAI's API[\s\S]*check the address"),
            answers.opened(Target.of(f"http://127.0.0.1:{site.server_address[1]}")),
        ):
            pass
    finally:
        site.shutdown()
        site.server_close()
    for body in ({"object": "chat.completion", "choices": []}, {"hello": 1}):
        fake.reply = lambda prompt, attempt, body=body: (200, body, {})  # type: ignore[misc]
        with pytest.raises(ServeError, match=r"is not OpenAI's API"):
            ask(fake, Prompt(text="a"))


def test_nobody_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # of no meaning for loopback
    with socket.socket() as silent:  # its port is nobody else's meanwhile
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(ServeError, match=rf"no answer from {url}/v1: .*refused[\s\S]*ray-ft serve"),
            answers.opened(Target.of(url)),
        ):
            pass


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ask(fake, Prompt(text="a"))[0].text == "<a>"


def test_a_server_that_goes_away_ends_the_batch(fake: Fake) -> None:
    with (
        answers.opened(Target.of("http://127.0.0.1:1", "tiny"), batch_size=2) as engine,
        pytest.raises(ServeError, match="no answer from http://127"),
    ):
        next(engine.answers([Prompt(text="a")], Sampling()))


def test_an_engine_cannot_be_chosen_for_an_endpoint(fake: Fake) -> None:
    with pytest.raises(ServeError, match="has its own engine"), answers.opened(Target.of(fake.url), "vllm"):
        pass
    with pytest.raises(ModelError, match="batch_size = 0"), answers.opened(Target.of(fake.url), batch_size=0):
        pass
