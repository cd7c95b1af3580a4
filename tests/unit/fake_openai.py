"""A server that speaks as much of OpenAI's API as is asked here, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any], dict[str, str]]  # status, body, headers


@dataclass
class Fake:
    """Settings may change while it runs.

    Attributes:
        reply: what a prompt is answered with, in place of the usual; None goes on to the usual.
        seconds: that each answer takes.
        key: the only one that is taken; None: any.
    """

    models: list[str] = field(default_factory=lambda: ["tiny"])
    reply: Callable[[str, int], Reply | None] = lambda prompt, attempt: None
    seconds: float = 0.0
    key: str | None = None
    url: str = ""
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Reply:
    return status, {"error": {"message": message, "type": "test", "code": None, "param": None}}, headers or {}


@contextmanager
def running() -> Iterator[Fake]:
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            refused = self._refused()
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in fake.models]}
            self._send(*(refused or (200, listed, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = self.path.endswith("/chat/completions")
            prompt = str(body["messages"][-1]["content"]) if chat else body["prompt"]
            with fake.lock:
                fake.asked.append(prompt)
                fake.bodies.append(body)
                fake.headers.append(dict(self.headers))
                fake.under_way += 1
                fake.most = max(fake.most, fake.under_way)
                attempt = fake.asked.count(prompt)
            time.sleep(fake.seconds)
            with fake.lock:
                fake.under_way -= 1
            self._send(*(self._refused() or fake.reply(prompt, attempt) or usual(prompt, chat, body)))

        def _refused(self) -> Reply | None:
            if fake.key is not None and self.headers["Authorization"] != f"Bearer {fake.key}":
                return error(401, "invalid key")
            return None

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that were killed
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def usual(prompt: str, chat: bool, body: dict[str, Any]) -> Reply:
    text = f"<{prompt}>"
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return (
        200,
        {
            "id": "x", "object": "chat.completion" if chat else "text_completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 3, "total_tokens": len(prompt) + 3},
        },
        {},
    )  # fmt: skip
