"""A private Ray head on loopback with its dashboard, jobs API and token, for tests that come to it from outside.

    with Head() as head:
        subprocess.run([...], env=head.env())

All ports are its own, so several may run on one machine. What it started is known by a mark in its environment, which
children inherit also when they outlive their parents, and is ended by process id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import patience
import psutil
from ports import free_ports
from servers import command_line, with_children

STORE = 150 << 20  # bytes of the object store
MARK = "RAY_FT_TEST_HEAD"
WAIT = 180  # seconds until a head must answer, on a busy machine


class Head:
    """`ray start --head` of one's own, ended with the block together with all that it started.

    Attributes:
        address: GCS, `127.0.0.1:port`, what RAY_ADDRESS takes in a driver on this machine.
        dashboard: dashboard and jobs API, `http://127.0.0.1:port`.
        metrics_port: where the node's Prometheus metrics are (path /metrics).
        token, token_file: the cluster's token, and the file (0600) that holds it.
        folder: the temporary folder; below it `session_latest/logs`.
        out: the file with what `ray start` printed.

    Args:
        num_cpus, num_gpus: what the node says that it has; GPUs need not exist.
        environment: more variables for Ray's processes, which jobs inherit.
        options: more options for `ray start`.
        auth: False: without a token, as a plain `ray start` is.
    """

    def __init__(
        self,
        num_cpus: int = 3,
        num_gpus: int = 0,
        environment: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
        auth: bool = True,
    ) -> None:
        self.num_cpus, self.num_gpus = num_cpus, num_gpus
        self.environment, self.options, self.auth = dict(environment or {}), options, auth
        self.token = secrets.token_hex(32)

    def __enter__(self) -> Head:
        patience.start(self._start, self.end)
        return self

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path is short
        self.token_file = self.folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token)
        gcs, dashboard, agent, agent_grpc, env_agent, client, self.metrics_port = free_ports(7)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.out = self.folder / "out"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
        ports = {
            "port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc, "runtime-env-agent-port": env_agent,
            "ray-client-server-port": client, "metrics-export-port": self.metrics_port,
            "min-worker-port": 0, "max-worker-port": 0,
        }  # fmt: skip
        ray += [f"--{name}={port}" for name, port in ports.items()]
        ray += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}"]
        ray += [f"--num-cpus={self.num_cpus}", f"--num-gpus={self.num_gpus}", f"--object-store-memory={STORE}"]
        own = {**self.env(token=self.auth), **self.environment, MARK: str(self.folder)}
        with open(self.out, "w") as out:  # without --block, which would end it all when one of its processes ends
            started = subprocess.run([*ray, *self.options], env=own, stdout=out, stderr=out, timeout=WAIT)
        assert started.returncode == 0, self.out.read_text()
        self._wait()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def env(self, token: bool = True, **more: str) -> dict[str, str]:
        """The environment of a process that talks to this head: with its token, or with none at all.

        RAY_ADDRESS is not in it, as a driver wants `address` there and the jobs API `dashboard`.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CUDA_VISIBLE"))}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"  # jobs call `python`
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        if not token:  # nor one in a home that somebody has used
            (self.folder / "home").mkdir(exist_ok=True)
            auth = {"HOME": str(self.folder / "home")}
        return {**kept, **loopback, **auth, **more}

    @property
    def logs(self) -> Path:
        return (self.folder / "session_latest").resolve() / "logs"

    def files(self, below: Path | None = None) -> Iterator[tuple[Path, bytes]]:
        """Every file below a folder of the head's, all of them if None, with its content; not those that Ray removes
        meanwhile."""
        for folder, _, names in os.walk(below or self.folder):
            for file in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    if file.is_file() and not file.is_symlink():
                        yield file, file.read_bytes()

    def processes(self) -> list[psutil.Process]:
        """Every process of this head that lives: Ray's own, workers, jobs and what those started."""
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    mine.append(process)
        return mine

    def restart_dashboard(self, away: float = 0) -> None:
        """End the dashboard, which has the jobs API, and start it again as it was after `away` seconds."""
        [old] = [
            one
            for one in self.processes()
            if any(part.endswith("dashboard/dashboard.py") for part in command_line(one).split())
        ]
        command, environment, below = old.cmdline(), old.environ(), old.children(recursive=True)
        for one in [old, *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs([old, *below], timeout=10)
        time.sleep(away)
        with open(self.folder / "dashboard", "a") as out:
            self._dashboard = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        self._wait()

    def end(self) -> None:
        for _ in range(20):  # a dying process may start another
            if not (left := with_children(self.processes())):
                break
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self) -> None:
        """Until the jobs API answers, which asks the agent that runs jobs, too: that comes up last."""
        auth = {"Authorization": f"Bearer {self.token}"}
        requests = [
            urllib.request.Request(f"{self.dashboard}/api/{path}", headers=auth) for path in ("version", "jobs/")
        ]
        until, said = time.monotonic() + WAIT, ""
        while time.monotonic() < until:
            try:
                for one in requests:
                    urllib.request.urlopen(one, timeout=20).close()
                return
            except OSError as error:
                said = str(error)
            time.sleep(0.3)
        raise AssertionError(f"no jobs API after {WAIT} s: {said}\n{self.out.read_text()}")
