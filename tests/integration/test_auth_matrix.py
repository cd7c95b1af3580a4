"""Who gets in, with no token, a bad one and the good one, at every HTTP door of a head that serves a model, and at the
cluster itself. What stays open is said in docs/security.md, with how to close it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from head import Head

from tests.integration.servers import command_line, connections, free_port
from tests.integration.test_serving_labels import write_classifier

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
KEY = "rft-a-key-of-the-tests-0123456789"
READY = 420  # seconds until the model answers, on a busy machine

NO, BAD, GOOD = 401, 403, 200  # no token, a wrong one, the cluster's
CLOSED = (NO, BAD, GOOD)
OPEN = (GOOD, GOOD, GOOD)


@dataclass(frozen=True)
class Doors:
    """Base URLs, and what each takes for good."""

    head: Head
    urls: dict[str, str]
    good: dict[str, str]

    def knock(self, door: str, method: str, path: str, **content: Any) -> tuple[int, ...]:
        shown = (None, "0" * 64, self.good[door])
        return tuple(
            httpx.request(
                method, self.urls[door] + path, headers={"Authorization": f"Bearer {token}"} if token else {},
                trust_env=False, timeout=60, **content,
            ).status_code
            for token in shown
        )  # fmt: skip


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """A head of its own, as what is served fills it, with a small classifier behind `ray-ft serve`."""
    folder = tmp_path_factory.mktemp("run")
    write_classifier(folder / "export")
    port, log = free_port(), folder / "out.txt"
    with Head() as head:
        env = head.env(
            RAY_ADDRESS=head.address, RAY_FT_API_KEYS=f"tests:{KEY}", XDG_RUNTIME_DIR=str(folder), PYTHONPATH=str(ROOT)
        )
        with log.open("wb") as out:
            serving = subprocess.Popen(
                [sys.executable, "-m", "ray_ft", "serve", str(folder / "export"), "--port", str(port)],
                stdout=out, stderr=out, env=env, cwd=folder,
            )  # fmt: skip
        try:
            until = time.monotonic() + READY
            while "stop it:" not in log.read_text():
                assert serving.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.5)
            commands = " ".join(map(command_line, head.processes()))
            agent = re.findall(r"--listen-port=(\d+)", commands)[0]
            here = "http://127.0.0.1:"
            yield Doors(
                head,
                {
                    "dashboard": head.dashboard, "agent": here + agent,
                    "metrics": f"{here}{head.metrics_port}", "serve": f"{here}{port}",
                },
                {**dict.fromkeys(["dashboard", "agent", "metrics"], head.token), "serve": KEY},
            )  # fmt: skip
        finally:
            serving.terminate()
            try:
                serving.wait(90)
            except subprocess.TimeoutExpired:
                serving.kill()
                serving.wait()


@pytest.mark.parametrize(
    ("door", "method", "path", "content", "expected"),
    [
        # Jobs: whoever may submit one may do anything.
        ("dashboard", "GET", "/api/jobs/", {}, CLOSED),
        ("dashboard", "POST", "/api/jobs/", {"json": {"entrypoint": "true"}}, CLOSED),
        ("dashboard", "DELETE", "/api/jobs/none", {}, (NO, BAD, 404)),
        ("dashboard", "PUT", "/api/packages/gcs/_ray_pkg_none.zip", {"content": b"x"}, CLOSED),
        ("agent", "POST", "/api/job_agent/jobs/", {"json": {"entrypoint": "true"}}, CLOSED),
        # What the dashboard knows.
        ("dashboard", "GET", "/nodes?view=summary", {}, CLOSED),
        ("dashboard", "GET", "/api/v0/actors", {}, CLOSED),
        ("dashboard", "GET", "/api/cluster_status", {}, CLOSED),
        ("dashboard", "GET", "/api/serve/applications/", {}, CLOSED),
        ("dashboard", "GET", "/api/version", {}, CLOSED),
        ("dashboard", "GET", "/events", {}, CLOSED),
        ("dashboard", "POST", "/api/authenticate", {}, CLOSED),
        ("agent", "GET", "/logs", {}, CLOSED),
        # Without a token: the page, which knows nothing by itself, and whether there is life.
        ("dashboard", "GET", "/", {}, OPEN),
        ("dashboard", "GET", "/api/authentication_mode", {}, OPEN),
        ("dashboard", "GET", "/api/gcs_healthz", {}, OPEN),
        ("agent", "GET", "/api/local_raylet_healthz", {}, OPEN),
        # Metrics: names of nodes, jobs, tasks and actors, and how much they do.
        ("metrics", "GET", "/metrics", {}, OPEN),
        # The model: keys of the gateway, not the cluster's token.
        ("serve", "GET", "/v1/models", {}, CLOSED),
        ("serve", "POST", "/v1/classify", {"json": {"model": "mood", "input": "ten"}}, CLOSED),
        ("serve", "GET", "/metrics", {}, (NO, BAD, 403)),  # for admins alone
        ("serve", "GET", "/health", {}, OPEN),
        ("serve", "GET", "/playground/", {}, OPEN),
        ("serve", "GET", "/-/routes", {}, (404, 404, 404)),
        ("serve", "GET", "/docs", {}, (404, 404, 404)),
    ],
)
def test_the_door(
    doors: Doors, door: str, method: str, path: str, content: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert doors.knock(door, method, path, **content) == expected


def test_the_tokens_of_cluster_and_model_are_two(doors: Doors) -> None:
    for door, path, other in (("serve", "/v1/models", doors.head.token), ("dashboard", "/api/jobs/", KEY)):
        answer = httpx.get(
            doors.urls[door] + path, headers={"Authorization": f"Bearer {other}"}, trust_env=False, timeout=60
        )
        assert answer.status_code == BAD


def test_every_other_http_port_asks(doors: Doors) -> None:
    """A door that nobody thought of: of all ports that listen, only those of the matrix answer without a token, and the
    metrics of the head's own processes."""
    known = {int(url.rpartition(":")[2]) for url in doors.urls.values()}
    answering = set()
    for process in doors.head.processes():
        for port in {one.laddr.port for one in connections(process) if one.status == "LISTEN"} - known:
            for path in ("/", "/-/routes", "/v1/models", "/metrics"):
                try:
                    answer = httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=5)
                except httpx.HTTPError:  # not HTTP/1: gRPC
                    break
                if answer.status_code < 400 and not answer.text.startswith("# HELP"):
                    answering.add((_script(process), path, answer.status_code))
                elif answer.status_code < 400:
                    answering.add((_script(process), "metrics", 200))
    assert answering <= {("monitor.py", "metrics", 200), ("dashboard.py", "metrics", 200)}


def _script(process: Any) -> str:
    return next((Path(part).name for part in command_line(process).split() if part.endswith(".py")), "")


JOIN = """
from ray_ft import session
from ray_ft.errors import CredentialError
try:
    with session.ray_running(session.address(), 0):
        import ray
        print("joined", len(ray.nodes()))
except CredentialError as error:
    print("refused:", error.what)
"""


@pytest.mark.parametrize(
    ("shown", "mode"), [("none", None), ("bad", None), ("good", None), ("none", "token"), ("good", "disabled")]
)
def test_the_cluster_itself(doors: Doors, shown: str, mode: str | None, tmp_path: Path) -> None:
    """A driver, by `session`: what was named "no cluster answers" for a missing token, after seconds of warnings."""
    token = tmp_path / "token"
    if shown != "none":
        token.touch(mode=0o600)
        token.write_text(doors.head.token if shown == "good" else "0" * 64)
    env = doors.head.env(token=False, RAY_ADDRESS=doors.head.address, RAY_AUTH_TOKEN_PATH=str(token), **_mode(mode))
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", JOIN], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if shown == "good" and mode != "disabled":
        assert done.stdout == "joined 1\n"
        return
    assert done.stdout.startswith(
        f"refused: the Ray cluster at RAY_ADDRESS={doors.head.address} asks for a token, and "
    )
    why = {"none": f"there is none in {token}", "bad": "it does not take the one that was shown"}.get(shown, "")
    if mode == "disabled" or (mode is None and shown == "none"):
        why = f"none was shown (RAY_AUTH_MODE={mode or ''})"
    assert done.stdout.endswith(f"{why}\n")
    assert "InvalidAuthToken" not in done.stderr
    assert time.monotonic() - began < 120  # of which most is importing Ray on a busy machine


def _mode(mode: str | None) -> dict[str, str]:
    return {} if mode is None else {"RAY_AUTH_MODE": mode}


def test_the_token_is_in_no_log(doors: Doors) -> None:
    found = dict(doors.head.files(doors.head.logs))
    assert [file for file, content in found.items() if doors.head.token.encode() in content] == []
    assert found
