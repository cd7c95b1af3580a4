"""Hosts exported models until it is told to stop: what `ray-ft serve RUN…` does, and `ray-ft serve --update`.

Uses the cluster of ``RAY_ADDRESS``, where one is set, else starts a private Ray that only this machine reaches. All of
Ray's and vLLM's own output stays in Ray's log files; a person sees what is being done, where the model answers, and, if
it fails, why. Limits: one endpoint on a cluster, and no Serve that someone else started on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ray_ft import credentials, session
from ray_ft.errors import ServeError
from ray_ft.hosts import is_loopback
from serving import address, app, engine, models, record, rollout
from serving.models import Model

if TYPE_CHECKING:
    from rich.console import Console

OBJECT_STORE = 256 * 1024**2  # bytes; requests and answers are small, the weights never pass through it
ENV_KEY = "RAY_FT_API_KEY"  # where clients keep the key that they ask with
MADE = "admin"  # name of the key that is made where none is configured


@dataclass(frozen=True)
class Endpoint:
    """Where models answer.

    Attributes:
        url: base URL of the OpenAI protocol, as clients want it: ``http://127.0.0.1:8000/v1``.
        model: name to ask for, the first of `names`.
        chat: whether that model has a chat template.
        classifies: whether it gives labels, and no text.
        key: API key that was made for this endpoint; None where the person has keys, or none is asked for.
        open: no key is asked for.
        playground: whether it has the page.
    """

    url: str
    model: str
    chat: bool
    key: str | None = None
    open: bool = False
    playground: bool = True
    names: tuple[str, ...] = ()
    classifies: bool = False

    def curl(self) -> str:
        """A command to paste into a shell that asks the model something."""
        body: dict[str, Any] = {"model": self.model}
        if self.classifies:
            path, body["input"] = "classify", "Hello!"
        elif self.chat:
            path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
        else:
            path = "completions"
            body |= {"prompt": "Hello!", "max_tokens": 32}
        auth = "" if self.open else f' -H "Authorization: Bearer {self.key or f"${ENV_KEY}"}"'
        return f"curl {self.url}/{path}{auth} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"

    def page(self) -> str:
        """The playground's address; a key in the fragment, which browsers do not send."""
        return f"{self.url.removesuffix('/v1')}/playground/{f'#key={self.key}' if self.key else ''}"


@dataclass(frozen=True)
class Replaced:
    """What the command line replaces of the manifests' serve sections; None leaves them."""

    host: str | None = None
    port: int | None = None
    model_name: str | None = None
    replicas: int | None = None
    max_model_len: int | None = None


def serve_run(
    runs: str | Sequence[str],
    replaced: Replaced | None = None,
    *,
    base: bool = False,
    console: Console | None = None,
) -> None:
    """Serve runs until SIGINT or SIGTERM, telling a person what happens in a few lines.

    Args:
        runs: run directories or export folders, paths or URIs.
        base: serve also the models that they were trained from.
        console: where to print; None: standard output.

    Raises:
        ServeError: no complete export, the port is taken, or a model does not start (with the replica's own error).
    """
    console = console or _console()
    progress = _Progress(console)
    server = served(runs, replaced, base=base, on_phase=progress.told)
    with _stop_signals():
        try:
            with progress, server as endpoint:
                progress.stop()
                console.print(f"{', '.join(endpoint.names)} at {endpoint.url} (ready in {progress.seconds:.0f} s)")
                with credentials.revealing(endpoint.key):
                    if endpoint.key:
                        console.print(f"  API key, made for this endpoint: {endpoint.key}")
                    console.print(f"  try it: {endpoint.curl()}")
                    if endpoint.playground:
                        console.print(f"  playground: {endpoint.page()}")
                console.print("  stop it: Ctrl-C")
                while True:
                    signal.pause()
        except KeyboardInterrupt:
            console.print("stopped")


@contextlib.contextmanager
def served(
    runs: str | Sequence[str],
    replaced: Replaced | None = None,
    *,
    base: bool = False,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Iterator[Endpoint]:
    """Runs that answer over HTTP while the block runs; afterwards Serve, Ray and vLLM are gone.

    Arguments and errors as of `serve_run`; `on_phase` is told in a few words what is being waited for.
    """
    found, host, port = _load(runs, replaced or Replaced(), base)
    cluster = session.address()
    if cluster:
        address.check_range(port)  # the rest once it is known whether that cluster's head is this machine
    else:
        address.check_port(host, port)
    settings, keys = app.gateway_of(found)
    made = None
    if settings["api_keys_file"] and not cluster:
        from serving.gateway.keys import Keys

        Keys(keys, settings["api_keys_file"])  # a file that cannot be used is said before a model is loaded
    if not keys and not settings["api_keys_file"] and not settings["open"]:
        from serving.gateway.keys import Keys, new_key

        made = new_key()
        keys = dict(Keys.parse_env(f"{MADE}:{made}"))
        settings["admins"] = [*settings["admins"], MADE]

    with _quiet(), _without(settings["api_keys_env"]), _ray(cluster, on_phase) as here:
        if cluster and here:
            address.check_port(host, port)
        with _applications(found, settings, keys, (host, port), on_phase) as fields, record.noted(port):
            url = f"http://{address.reachable(host)}:{port}/v1"
            if here:
                _wait_for_http(url, on_phase)
            first = fields[0]
            yield Endpoint(
                url, first["name"], first["chat"], made, settings["open"], settings["playground"],
                tuple(each["name"] for each in fields), first["kind"] == "classify",
            )  # fmt: skip


def update(
    runs: str | Sequence[str], replaced: Replaced | None = None, *, base: bool = False, console: Console | None = None
) -> None:
    """Bring exports to an endpoint that runs: a model of the same name is replaced, any other is added.

    No request fails: a new version answers once it has been proved, and the old one finishes what it has begun.

    Raises:
        ServeError: nothing is served there, or a new version is refused; then the old one keeps answering.
    """
    console = console or _console()
    progress = _Progress(console)
    found, _, port = _load(runs, replaced or Replaced(), base)
    cluster = session.address() or record.look_up(port)
    with _quiet(), progress, _ray(cluster, progress.told):
        from ray import serve

        if app.APPLICATION not in serve.status().applications:
            raise ServeError(
                f"no endpoint of ray-ft runs on the cluster at {cluster!r}", ["start it: ray-ft serve RUN"]
            )
        with _refused_by_name():
            lines = rollout.update(found, progress.told, _logs())
    for line in lines:
        console.print(line)


@contextlib.contextmanager
def _refused_by_name() -> Iterator[None]:
    try:
        yield
    except ServeError as error:
        raise ServeError(f"refused, and what answered before goes on: {error.what}", error.ways_out) from error


def _load(runs: str | Sequence[str], replaced: Replaced, base: bool) -> tuple[list[Model], str, int]:
    """(The engines, the host and the port of their endpoint: the first one's, where not replaced)."""
    values = dataclasses.asdict(replaced)
    host, port = values.pop("host"), values.pop("port")
    options = app.check_args({"run": runs, **values})
    found = models.load(options.pop("run"), base=base, **options)
    serve = found[0].serve
    host = host or serve["host"]
    if serve["gateway"]["open"] and not is_loopback(host):
        raise ServeError(
            f"serve.gateway.open lets anyone ask who reaches --host {host}",
            ["--host 127.0.0.1", "serve.gateway.open=false, and export again: keys are then asked for"],
        )
    return found, host, serve["port"] if port is None else port


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
def _applications(
    found: Sequence[Model],
    settings: Mapping[str, Any],
    keys: Mapping[str, str],
    listen: tuple[str, int],
    on_phase: Callable[[str], None],
) -> Iterator[list[dict[str, Any]]]:
    """Engines and gateway, deployed and proved. Yields the routes."""
    from ray import serve

    if serve.status().applications:
        raise ServeError(
            f"Ray Serve already runs on the cluster at {os.environ.get('RAY_ADDRESS')!r}",
            [
                "replace or add models there: ray-ft serve RUN --update",
                "end it, if it is yours: serve shutdown",
                "unset RAY_ADDRESS to serve from this machine",
            ],
        )
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="import") as pool:
            # 8 s of one core, most of it in torch and vLLM, while Serve's processes start on others.
            heavy = "ray.serve" if all(model.classifies for model in found) else "ray.serve.llm"
            imported = pool.submit(importlib.import_module, heavy)
            on_phase("starting Serve")
            # The gateway listens itself: Serve's proxy would be one more process for each token to pass.
            serve.start(proxy_location="Disabled")
            imported.result()
        cluster = engine.Cluster.read()
        plans = {app.name_of(model): engine.plan(model, cluster) for model in found}
        rollout.deploy_gateway([], settings, keys, listen)
        rollout.start(found, plans, on_phase, _logs())
        fields = app.routes(found, plans)
        on_phase("opening the endpoint")
        rollout.switch(fields, settings, keys, listen)
        yield fields
    finally:
        with session.closing():
            serve.shutdown()


def _logs() -> Path:
    import ray

    return Path(ray._private.worker._global_node.get_logs_dir_path())


def _wait_for_http(url: str, on_phase: Callable[[str], None]) -> None:
    """The gateway listens, and its models are well.

    Raises:
        ServeError: it does not answer within a minute.
    """
    on_phase("waiting for the first answer")
    # It is this machine's own address, for which http_proxy is not meant.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 60
    while True:
        try:
            with direct.open(f"{url.removesuffix('/v1')}/health", timeout=10):
                return
        except OSError as error:  # of which urllib's errors are kinds
            if time.monotonic() > deadline:
                raise ServeError(
                    f"the model is loaded, but {url} does not answer: {error}",
                    ["try another serve.port"],
                ) from error
            time.sleep(0.2)


# --------------------------------------------------------------------------------------- processes, signals, output


def _console() -> Console:
    from rich.console import Console

    # soft_wrap: a command that was broken into lines cannot be pasted. markup: text in brackets is text.
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)


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


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Without a variable of the environment, which the processes of a Ray that starts here would all inherit."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


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
