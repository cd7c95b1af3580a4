"""The gateway's parts by themselves: keys, limits, fields, bodies, and streams."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fake_engine as fake
import pytest

from ray_ft.errors import ServeError
from ray_ft.recipe.serve import Gateway as Section
from serving.gateway import Keys, Settings, body, fields, key_line, new_key, stream
from serving.gateway.limits import Limits
from serving.gateway.refusal import Refusal

LONG = "a-key-that-is-long-enough"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_are_the_recipes() -> None:
    section = Section(media_domains=["a.example.org"], max_tokens=7)
    settings = Settings.of(section.model_dump())
    assert settings.media_domains == ("a.example.org",)
    assert settings.max_tokens == 7
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(Settings()).items()}
    assert own.pop("body_seconds") == 30
    assert own == Section().model_dump()  # the same settings with the same defaults


def test_settings_of_another_version() -> None:
    with pytest.raises(ServeError, match="max_beams"):
        Settings.of({"max_beams": 3})


# -------------------------------------------------------------------------------------------------------------- keys


def test_keys_from_the_environment() -> None:
    parsed = Keys.parse_env(f"alice:{LONG}, bob:sha256:{'ab' * 32},")
    assert parsed == {"alice": hashlib.sha256(LONG.encode()).hexdigest(), "bob": "ab" * 32}
    keys = Keys(parsed, admins=["alice"])
    assert keys.client(f"Bearer {LONG}").name == "alice"
    assert keys.client(f"bearer  {LONG} ").admin
    assert LONG not in repr(keys)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {LONG}", LONG])
def test_no_key(header: str | None) -> None:
    with pytest.raises(Refusal) as refusal:
        fake.keys().client(header)
    assert refusal.value.status == 401


@pytest.mark.parametrize("key", [LONG + "x", LONG[:-1], "ключ-ключ-ключ-ключ", "alice", "é" * 40])
def test_wrong_key(key: str) -> None:
    with pytest.raises(Refusal) as refusal:
        Keys(Keys.parse_env(f"alice:{LONG}")).client(f"Bearer {key}")
    assert refusal.value.status == 403
    assert key not in refusal.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LONG, "no colon"),
        ("alice:short", "5 characters"),
        (f"a b:{LONG}", "name"),
        (f"alice:{LONG},alice:{LONG}1", "earlier"),
        ("alice:sha256:abc", "64"),
        (f"alice:{LONG} {LONG}", "spaces"),
    ],
)
def test_keys_that_cannot_be_used(text: str, said: str) -> None:
    with pytest.raises(ServeError, match=said) as error:
        Keys.parse_env(text)
    assert LONG not in str(error.value)
    assert "short" not in str(error.value).replace("shortest", "")


def test_new_keys_differ_and_load(tmp_path: Path) -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert len(first) > 40
    file = tmp_path / "keys"
    line = key_line("carol", first)
    assert first not in line
    file.write_text(f"# keys\n\n{line}\ncarol {second}\n")
    keys = Keys({}, str(file))
    assert {keys.client(f"Bearer {key}").name for key in (first, second)} == {"carol"}


def test_rotation_without_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, file, newer = Clock(), tmp_path / "keys", LONG + "-2"
    file.write_text(f"alice {LONG}\n")
    file.chmod(0o600)
    keys = Keys({}, str(file), clock=clock)

    def known(key: str) -> bool:
        clock.now += 2
        try:
            return keys.client(f"Bearer {key}").name == "alice"
        except Refusal:
            return False

    assert known(LONG)
    assert not known(newer)
    file.write_text(f"alice {LONG}\nalice {newer}\n")
    assert known(LONG)
    assert known(newer)
    replaced = tmp_path / "other"  # as an editor does: the same size, another inode
    replaced.write_text(f"alice {newer}\n")
    os.replace(replaced, file)
    assert known(newer)
    assert not known(LONG)

    for broken in ("alice short\n", "", "alice\n", f"alice {newer}\nbob {newer}\n", "\x00\xff"):
        file.write_bytes(broken.encode("latin-1"))
        assert known(newer), broken
    assert known(newer)
    file.unlink()
    assert known(newer)
    assert len([record for record in caplog.records if "stay as they were" in record.message]) == 6
    file.write_text("# nobody\n")
    assert not known(newer)
    assert LONG not in caplog.text


def test_an_old_file_is_not_read_again(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "keys"
    file.write_text(f"alice {LONG}\n")
    keys = Keys({}, str(file), clock=clock)
    file.write_text("# nobody\n")
    assert keys.client(f"Bearer {LONG}").name == "alice"  # looked at within the last second
    clock.now += 2
    with pytest.raises(Refusal):
        keys.client(f"Bearer {LONG}")


def test_a_file_that_others_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {LONG}\n")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Keys({}, str(file))
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("content", ["alice", f"alice {LONG} x", "alice short", f"a/b {LONG}", "alice sha256:00"])
def test_a_file_that_cannot_be_used_at_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# first\n{content}\n")
    with pytest.raises(ServeError, match="line 2") as error:
        Keys({}, str(file))
    assert LONG not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="api_keys_file"):
        Keys({}, str(tmp_path / "none"))


# ------------------------------------------------------------------------------------------------------------ limits


def test_the_first_request_of_a_key_is_within_any_limit() -> None:
    ticks = itertools.count(100.0, 0.001)
    Limits(1, None, lambda: next(ticks)).admit("anna", 10)


def test_requests_a_minute() -> None:
    clock = Clock()
    limits = Limits(6, None, clock)
    for _ in range(6):
        limits.admit("alice", 0)
    with pytest.raises(Refusal) as refusal:
        limits.admit("alice", 0)
    headers = dict(refusal.value.headers)
    assert refusal.value.status == 429
    assert headers[b"retry-after"] == b"10"
    assert headers[b"x-ratelimit-limit-requests"] == b"6"
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] == b"60.0s"
    limits.admit("bob", 0)  # each key has its own
    clock.now += 10
    limits.admit("alice", 0)
    with pytest.raises(Refusal):
        limits.admit("alice", 0)


def test_tokens_a_minute_are_settled() -> None:
    clock = Clock()
    limits = Limits(None, 600, clock)
    limits.admit("alice", 100)
    limits.settle("alice", 100, 20)
    assert dict(limits.headers("alice"))[b"x-ratelimit-remaining-tokens"] == b"580"
    limits.admit("alice", 100)
    limits.settle("alice", 100, 1180)  # 600 more than there was: a minute of debt
    assert dict(limits.headers("alice"))[b"x-ratelimit-remaining-tokens"] == b"0"
    clock.now += 59
    with pytest.raises(Refusal):
        limits.admit("alice", 1)
    clock.now += 2
    limits.admit("alice", 1)


def test_an_estimate_above_the_minute_waits_for_a_full_bucket() -> None:
    clock = Clock()
    limits = Limits(None, 600, clock)
    limits.admit("alice", 10_000)
    with pytest.raises(Refusal):
        limits.admit("alice", 1)


def test_a_refused_request_takes_nothing() -> None:
    limits = Limits(10, 100, Clock())
    limits.admit("alice", 100)
    with pytest.raises(Refusal):
        limits.admit("alice", 50)
    assert dict(limits.headers("alice"))[b"x-ratelimit-remaining-requests"] == b"9"


def test_no_limits_no_headers() -> None:
    limits = Limits(None, None)
    limits.admit("alice", 1)
    limits.settle("alice", 1, 10**9)
    assert limits.headers("alice") == []


# ------------------------------------------------------------------------------------------------------------ bodies


def read(
    messages: Iterable[dict[str, Any]], length: bytes | None = None, most: int = 100, seconds: float = 60
) -> bytes:
    left = iter(messages)

    async def receive() -> Any:
        message = next(left)
        if message.pop("never", False):
            await asyncio.sleep(3600)
        return {"type": "http.request", **message}

    return asyncio.run(body.read(receive, length, most, seconds))


def test_a_body_in_pieces() -> None:
    assert read([{"body": b"ab", "more_body": True}, {"body": b"c"}]) == b"abc"
    assert read([{"body": b"abc"}], b"3") == b"abc"


@pytest.mark.parametrize(
    ("messages", "length", "status"),
    [
        ([], b"101", 413),
        ([], b"1" * 40, 413),
        ([], b"-5", 400),
        ([{"body": b"a" * 60, "more_body": True}] * 2, None, 413),
        ([{"body": b"a", "more_body": True}, {"never": True}], None, 408),
    ],
)
def test_a_body_that_is_refused(messages: list[dict[str, Any]], length: bytes | None, status: int) -> None:
    with pytest.raises(Refusal) as refusal:
        read(messages, length, seconds=0.2 if status == 408 else 60)
    assert refusal.value.status == status
    assert (b"connection", b"close") in refusal.value.headers  # what follows on it is the rest of the body


def test_nothing_is_read_of_a_body_that_says_it_is_too_large() -> None:
    with pytest.raises(Refusal):
        read([], b"101")  # an empty iterator would end in StopIteration


def test_what_is_written_is_what_was_understood() -> None:
    content = body.parse('{"a": "é", "b": [1, 2.5, null, true], "c": "\\u0000"}'.encode())
    assert json.loads(body.write(content)) == content


# ------------------------------------------------------------------------------------------------------------ fields

ROUTE = fake.route("demo", fake.Backend("http://engine"), engine_name="engine/base", max_model_len=100)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def checked(path: str, settings: Settings | None = None, **content: Any) -> fields.Asked:
    return fields.check(path, {"model": "demo", **content}, settings or Settings(), ROUTE)


def test_what_the_engine_is_asked() -> None:
    asked = checked(CHAT, messages=MESSAGES, max_tokens=10, n=2, stop=["a"], temperature=0, user=None)
    assert asked.body == {
        "model": "engine/base", "messages": MESSAGES, "max_tokens": 10, "n": 2, "stop": ["a"], "temperature": 0,
    }  # fmt: skip
    assert (asked.choices, asked.answer_most, asked.prompt_estimate) == (2, 20, 6)
    assert not asked.stream


def test_usage_is_always_asked_for() -> None:
    asked = checked(CHAT, messages=MESSAGES, stream=True)
    assert asked.body["stream_options"] == {"include_usage": True}
    assert not asked.usage
    shown = checked(CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    assert shown.usage


def test_token_ids_and_prompt_logprobs_are_allowed() -> None:
    asked = checked(COMPLETIONS, prompt=[[1, 2, 3], [4]], max_tokens=1, prompt_logprobs=5, logprobs=20, temperature=0)
    assert (asked.choices, asked.prompt_estimate) == (2, 4)
    assert asked.body["prompt"] == [[1, 2, 3], [4]]


def test_the_longest_answer() -> None:
    capped = Settings(max_tokens=8)
    assert checked(CHAT, capped, messages=MESSAGES).body["max_tokens"] == 8
    assert checked(COMPLETIONS, capped, prompt="a").body["max_tokens"] == 8
    assert checked(COMPLETIONS, prompt="a").body["max_tokens"] == 16
    assert "max_tokens" not in checked(CHAT, messages=MESSAGES).body
    for name in ("max_tokens", "max_completion_tokens"):
        assert name in checked(CHAT, capped, messages=MESSAGES, **{name: 8}).body
        with pytest.raises(Refusal, match="from 1 to 8"):
            checked(CHAT, capped, messages=MESSAGES, **{name: 9})
        with pytest.raises(Refusal, match="from 1 to 100"):
            checked(CHAT, messages=MESSAGES, **{name: 101})


@pytest.mark.parametrize(
    ("content", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"chat_template": "x"}, "chat_template", "not offered"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream: false"),
        ({"messages": [{"role": "user", "content": "a", "nmae": "b"}]}, "nmae", "did you mean 'name'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "see images"),
    ],
)
def test_a_field_that_is_refused(content: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(Refusal, match=said) as refusal:
        checked(CHAT, **{"messages": MESSAGES, **content})
    assert refusal.value.status == 400
    assert refusal.value.param == param


def test_a_missing_prompt() -> None:
    with pytest.raises(Refusal, match="'prompt' is missing"):
        checked(COMPLETIONS)
    with pytest.raises(Refusal, match="'messages' is missing"):
        checked(CHAT, messages=None)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,iVBORw0KGgoAAAA=",
        "https://images.example.org/a/b.png?size=1",
        "https://images.example.org:443/a.png",
    ],
)
def test_an_image_that_is_allowed(url: str) -> None:
    seeing = fake.route("demo", fake.Backend("http://engine"), vision=True)
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    content = {"model": "demo", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
    asked = fields.check(CHAT, content, Settings(media_domains=("images.example.org",)), seeing)
    assert asked.body["messages"][0]["content"][1] == part


def test_a_json_schema_may_have_a_property_named_pattern() -> None:
    schema = {"type": "object", "properties": {"pattern": {"type": "string"}}}
    kind = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert checked(CHAT, messages=MESSAGES, response_format=kind).body["response_format"] == kind


# ----------------------------------------------------------------------------------------------------------- streams


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


PIECE = event({"model": "in", "choices": [{"delta": {"content": 'a "model":"in","choices":[], "usage":{"x" é'}}]})
USAGE = event({"model": "in", "choices": [], "usage": {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5}})
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 7, 50, 1000])
@pytest.mark.parametrize("show", [False, True])
def test_events_in_any_pieces(size: int, show: bool) -> None:
    data = PIECE * 3 + USAGE + DONE
    events = stream.Events(("in", "out"), show)
    passed = b"".join(events.passed(data[at : at + size]) for at in range(0, len(data), size))
    renamed = PIECE.replace(b'{"model":"in"', b'{"model":"out"')
    assert renamed != PIECE
    assert rb"\"model\":\"in\"" in renamed  # inside the answer it is text
    assert passed == renamed * 3 + (USAGE.replace(b'"in"', b'"out"') if show else b"") + DONE
    assert (events.count, events.usage, events.done) == (3, (7, 5), True)


def test_an_error_in_a_stream_is_held_back() -> None:
    events = stream.Events(("a", "a"), False)
    assert events.passed(PIECE + event({"error": {"message": "at 10.0.0.1", "code": 500}})) == PIECE
    assert events.error == {"message": "at 10.0.0.1", "code": 500}


def test_usage_of_an_answer() -> None:
    whole = (
        b'{"choices":[{"text":"\\"usage\\":{\\"prompt_tokens\\":999"}],"usage":{"prompt_tokens":3,"total_tokens":3}}'
    )
    assert stream.usage(whole) == (3, 0)
    assert stream.usage(b'{"choices":[]}') is None
