"""Hosts one exported model until it is told to stop: what `ray-ft serve RUN` does.

Uses the cluster of ``RAY_ADDRESS``, where one is set, else starts a private Ray that only this machine reaches. All of
Ray's and vLLM's own output stays in Ray's log files; a person sees what is being done, where the model answers, and, if
it fails, why. Limits: one application, and no Serve that someone else started on the cluster.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import shlex
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ray_ft import paths, session
from ray_ft.errors import ServeError
from ray_ft.paths import Manifest
from serving import app

if TYPE_CHECKING:
    from rich.console import Console

OBJECT_STORE = 256 * 1024**2  # bytes; requests and answers are small, the weights never pass through it
LOG_TAIL = 12  # lines of a failed replica's log that are shown
APPLICATION = "ray-ft"  # its name within Serve


@dataclass(frozen=True)
class Endpoint:
    """Where a served model answers.

    Attributes:
        url: base URL of the OpenAI protocol, as clients want it: ``http://127.0.0.1:8000/v1``.
        model: name to ask for.
        chat: whether the model has a chat template.
    """

    url: str
    model: str
    chat: bool

    def curl(self) -> str:
        """A command to paste into a shell that asks the model something."""
        body: dict[str, Any] = {"model": self.model}
        if self.chat:
            body["messages"] = [{"role": "user", "content": "Hello!"}]
        else:
            body |= {"prompt": "Hello!", "max_tokens": 32}
        path = "chat/completions" if self.chat else "completions"
        return f"curl {self.url}/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def serve_run(
    run: str,
    host: str | None = None,
    port: int | None = None,
    *,
    model_name: str | None = None,
    replicas: int | None = None,
    max_model_len: int | None = None,
    on_ready: Callable[[Endpoint], None] | None = None,
    console: Console | None = None,
) -> None:
    """Serve a run until SIGINT or SIGTERM, telling a person what happens in a few lines.

    Args:
        run: run directory or export folder, a path or URI.
        host: address to listen on; None: the manifest's ``serve.host``.
        port: HTTP port; None: the manifest's ``serve.port``.
        model_name, replicas, max_model_len: replace the manifest's values (see `serving.engine.plan`).
        on_ready: called once the model answers.
        console: where to print; None: standard output.

    Raises:
        ServeError: no complete export, the port is taken, or the model does not start (with the replica's own error).
    """
    from rich.console import Console

    # soft_wrap: a command that was broken into lines cannot be pasted. markup: text in brackets is text.
    console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    progress = _Progress(console)
    server = served(
        run, host, port, model_name=model_name, replicas=replicas, max_model_len=max_model_len, on_phase=progress.told
    )
    with _stop_signals():
        try:
            with progress, server as endpoint:
                progress.stop()
                console.print(f"{endpoint.model} answers at {endpoint.url} (ready in {progress.seconds:.0f} s)")
                console.print(f"  try it: {endpoint.curl()}")
                console.print("  stop it: Ctrl-C")
                if on_ready is not None:
                    on_ready(endpoint)
                while True:
                    signal.pause()
        except KeyboardInterrupt:
            console.print("stopped")


@contextlib.contextmanager
def served(
    run: str,
    host: str | None = None,
    port: int | None = None,
    *,
    model_name: str | None = None,
    replicas: int | None = None,
    max_model_len: int | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Iterator[Endpoint]:
    """A run that answers over HTTP while the block runs; afterwards Serve, Ray and vLLM are gone.

    Arguments and errors as of `serve_run`; `on_phase` is told in a few words what is being waited for.
    """
    overrides = {"model_name": model_name, "replicas": replicas, "max_model_len": max_model_len}
    options = app.check_args({"run": run, **overrides})
    manifest, hf_config = app.load(options.pop("run"))
    host, port = host or manifest.serve["host"], manifest.serve["port"] if port is None else port
    address = session.address()
    if address:
        _check_range(port)  # the rest once it is known whether that cluster's head is this machine
    else:
        check_port(host, port)

    with _quiet(), _ray(address, on_phase) as here:
        if address and here:
            check_port(host, port)
        with _application(manifest, hf_config, host, port, options, on_phase) as name:
            reachable = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}/v1"
            if here:
                _wait_for_http(url, on_phase)
            yield Endpoint(url, name, _has_chat_template(manifest))


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        ServeError: the port is none, taken or reserved, or the address is unknown or not one of this machine.
    """
    _check_range(port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As Serve's proxy does: a port whose last user has just gone is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            with socket.socket(family, socket.SOCK_STREAM) as other:
                try:
                    other.bind((host, 0))
                    free: int | None = other.getsockname()[1]
                except OSError:
                    free = None
            raise ServeError(
                f"cannot listen on serve.host {host!r}, serve.port {port}: {error.strerror}",  # of names, too
                [
                    f"choose another port, such as the free {free}: --port {free}",
                    f"see who has it: ss -ltnp 'sport = :{port}'",
                ]
                if free
                else ["choose an address of this machine: --host 127.0.0.1"],
            ) from error


def _check_range(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ServeError(
            f"serve.port {port} is not a port: they go from 1 to 65535",
            ["choose another: --port 8000", "leave --port out: serve.port of the recipe"],
        )


# --------------------------------------------------------------------------------------------------- Ray and Serve


@contextlib.contextmanager
def _ray(address: str, on_phase: Callable[[str], None]) -> Iterator[bool]:
    """Connected to Ray. Yields whether the head node, where HTTP is listened to, is this machine."""
    on_phase(f"connecting to Ray at {address}" if address else "starting Ray")
    with session.ray_running(address, OBJECT_STORE):
        import ray

        head = next((node for node in ray.nodes() if "node:__internal_head__" in node["Resources"]), None)
        yield head is None or head["NodeID"] == ray.get_runtime_context().get_node_id()


@contextlib.contextmanager
def _application(
    manifest: Manifest,
    hf_config: dict[str, Any],
    host: str,
    port: int,
    options: dict[str, Any],
    on_phase: Callable[[str], None],
) -> Iterator[str]:
    """The application, deployed and healthy. Yields the model's name."""
    import ray
    from ray import serve

    if serve.status().proxies:
        raise ServeError(
            f"Ray Serve already runs on the cluster at {os.environ.get('RAY_ADDRESS')!r}",
            [
                "add the model to what it serves: serve deploy serving/config.yaml",
                "end it, if it is yours: serve shutdown",
                "unset RAY_ADDRESS to serve from this machine",
            ],
        )
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="import") as pool:
            # 8 s of one core, most of it in torch and vLLM, while Serve's processes start on others.
            imported = pool.submit(importlib.import_module, "ray.serve.llm")
            on_phase("starting Serve")
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            imported.result()
        application = app.build_from(manifest, hf_config, **options)
        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_until_running(on_phase, Path(ray._private.worker._global_node.get_logs_dir_path()))
        yield options.get("model_name") or manifest.serve["model_name"] or manifest.run
    finally:
        with session.closing():
            serve.shutdown()


def _wait_until_running(on_phase: Callable[[str], None], logs: Path) -> None:
    from ray import serve

    while True:
        overview = serve.status().applications[APPLICATION]
        messages = [deployment.message for deployment in overview.deployments.values()]
        if overview.status == "RUNNING":
            return
        if overview.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise _failure("\n".join([overview.message, *messages]), logs)
        # Serve says so after 30 s without a node that has the resources.
        waiting = next((message for message in messages if "to be scheduled" in message), None)
        on_phase(f"waiting for resources: {' '.join(waiting.split())[:200]}" if waiting else "loading the model")
        time.sleep(0.5)


def _failure(message: str, logs: Path) -> ServeError:
    """The cause of a failed start, from what Serve was told and what the replica's processes wrote.

    vLLM's engine fails in processes of its own; the replica only learns that it did.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)
    is_cause = re.compile(r"(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)): ?\S")
    causes = [line.strip() for line in plain.splitlines() if is_cause.match(line.strip())]
    cause, tail = (causes or [plain.strip().splitlines()[-1] if plain.strip() else "no reason given"])[-1], []
    replica = re.search(r"pid=(\d+)", plain)
    if replica:
        # One line of vLLM's: (Worker pid=12) ERROR 11-21 02:58:41 [core.py:953] RuntimeError: …
        error = re.compile(r"^\(\w[\w-]* pid=\d+\) ERROR [\d: -]+\[[^\]]+\] ?(.*)$")
        for path in sorted(logs.glob(f"worker-*-{replica[1]}.out")) + sorted(logs.glob(f"worker-*-{replica[1]}.err")):
            lines = [match[1] for match in map(error.match, path.read_text(errors="replace").splitlines()) if match]
            at = next((i for i, line in enumerate(lines) if is_cause.match(line)), None)
            if at is not None:  # the first is the cause, later ones are processes that noticed
                cause, tail = lines[at], lines[max(0, at - LOG_TAIL) : at]
                break
    if "No module named 'serving'" in plain:
        cause = "the cluster's nodes do not have this package installed"
    shown = "".join(f"\n    {line}" for line in tail)
    return ServeError(
        f"the model did not start: {cause}{shown}",
        [f"the whole log is in {logs}", "check the model's folder: ray-ft export RUN writes it again"],
    )


def _wait_for_http(url: str, on_phase: Callable[[str], None]) -> None:
    """Serve's proxy learns of the application some moments after it runs.

    Raises:
        ServeError: it does not answer within a minute.
    """
    on_phase("waiting for the first answer")
    # It is this machine's own address, for which http_proxy is not meant.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 60
    while True:
        try:
            with direct.open(f"{url}/models", timeout=10):
                return
        except OSError as error:  # of which urllib's errors are kinds
            if time.monotonic() > deadline:
                raise ServeError(
                    f"the model is loaded, but {url} does not answer: {error}",
                    ["try another serve.port"],
                ) from error
            time.sleep(0.2)


def _has_chat_template(manifest: Manifest) -> bool:
    if "chat_template.jinja" in manifest.content["files"]:
        return True
    tokenizer = paths.join(manifest.folder, "tokenizer_config.json")
    return paths.exists(tokenizer) and bool(paths.read_json(tokenizer).get("chat_template"))


# --------------------------------------------------------------------------------------- processes, signals, output


def _stop_signals() -> contextlib.AbstractContextManager[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    return session.handling(stop)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back log messages below errors in this process; Ray's other processes write theirs to files.

    Importing ray.serve.llm replaces the root logger's handlers; they are put back.
    """
    root = logging.getLogger()
    disabled, handlers, level = root.manager.disable, root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


class _Progress:
    """What is being waited for: one line that changes on a terminal, else one line a phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._phase = ""
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> _Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._status:
            self._status.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def told(self, phase: str) -> None:
        if self._status:
            self._status.update(f"{phase} … {self.seconds:.0f} s")
        elif phase != self._phase:
            self._console.print(f"{phase} …")
        self._phase = phase
