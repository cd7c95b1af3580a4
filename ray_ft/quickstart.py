"""The whole way in one command, through the public command line: `make quickstart`.

Everything is as a person would type it; this module only types. A failing step ends it with the step's name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray_ft import recipe
from ray_ft.errors import RayFtError
from ray_ft.evaluate import Question, held_out_questions, score
from ray_ft.view import View

RECIPE = "configs/quickstart.yaml"
ENOUGH = 0.90  # exact match over HTTP below which something is broken
CLIENTS = 8  # requests at once
START_SECONDS = 300
STOP_SECONDS = 60


class StepFailed(Exception):
    """A step's name and what became of it."""


def main() -> None:
    view, began = View(), time.monotonic()
    try:
        with _step("recipe"):
            settings = recipe.load(RECIPE)
        run = str(Path(settings.run.dir.root).relative_to(Path.cwd()))
        for name, arguments in (
            ("demo", ["demo"]),
            ("data", ["data", RECIPE, "--examples", "2"]),
            ("train", ["train", RECIPE]),
            ("evaluate", ["evaluate", run]),
            ("export", ["export", run]),
            ("report", ["report", run]),
        ):
            _announce(view, arguments)
            _ray_ft(name, arguments)
        with _step("questions"):
            questions = held_out_questions(settings, settings.evaluate.max_rows)
        port = free_port()
        arguments = ["serve", run, "--port", str(port)]
        _announce(view, arguments)
        key = secrets.token_urlsafe(32)
        with serving(arguments, port, key) as url:
            name = settings.serve.model_name or settings.run.name
            answers = ask(url, key, name, questions, settings.evaluate.max_new_tokens)
        result = score(answers, [question.reference for question in questions])
        if result["exact_match"] < ENOUGH:
            raise StepFailed(f"ask: exact match over HTTP is {result['exact_match']:.3f}, below {ENOUGH}")
    except StepFailed as failure:
        print(f"quickstart failed at step {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("quickstart stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    view.line(
        f"quickstart ok: exact match {result['exact_match']:.3f}, chrF {result['chrf']:.1f}, "
        f"{len(answers)} requests over HTTP, {time.monotonic() - began:.0f} s"
    )


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except RayFtError as error:
        raise StepFailed(f"{name}: {error}") from error


def _announce(view: View, arguments: Sequence[str]) -> None:
    view.console.print(f"[bold cyan]$ ray-ft {' '.join(arguments)}[/]")


def _ray_ft(name: str, arguments: Sequence[str]) -> None:
    code = subprocess.run([sys.executable, "-m", "ray_ft", *arguments], check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise StepFailed(f"{name}: ray-ft {' '.join(arguments)} exited with {code}")


@contextlib.contextmanager
def serving(arguments: Sequence[str], port: int, key: str) -> Iterator[str]:
    """`ray-ft serve` in the background. Yields its URL; afterwards neither it nor any process that it began is left."""
    import httpx
    import psutil

    url = f"http://127.0.0.1:{port}/v1"
    env = {**os.environ, "RAY_FT_API_KEYS": f"quickstart:{key}"}
    server = psutil.Popen([sys.executable, "-m", "ray_ft", *arguments], env=env)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if (code := server.poll()) is not None:
                raise StepFailed(f"serve: it exited with {code} before it answered")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url.removesuffix('/v1')}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise StepFailed(f"serve: no answer at {url} within {START_SECONDS} s")
            time.sleep(0.5)
        time.sleep(0.5)  # lets the server say that it is ready before anything else is printed
        family = server.children(recursive=True)
        yield url
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([server, *family], timeout=STOP_SECONDS)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if alive:
        raise StepFailed(f"serve: {len(alive)} processes did not end within {STOP_SECONDS} s and were killed")


def ask(url: str, key: str, model: str, questions: Sequence[Question], max_tokens: int) -> list[str]:
    import openai

    # trust_env: http_proxy is not for this machine's own address.
    client = openai.OpenAI(base_url=url, api_key=key, http_client=openai.DefaultHttpxClient(trust_env=False))

    def one(question: Question) -> str:
        messages: Any = question.prompt.messages
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=max_tokens)
        return reply.choices[0].message.content or ""

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(one, questions))
    except openai.OpenAIError as error:
        raise StepFailed(f"ask: {error}") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
