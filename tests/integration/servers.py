"""`ray-ft serve` as a person starts it: a process in a session of its own, and those below it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ports import free_ports

ROOT = Path(__file__).parents[2]
READY = 420  # seconds; 50 on two free cores, several times that where others compute too
KEY = "rft-a-key-of-the-tests-0123456789"


def free_port() -> int:
    return free_ports(1)[0]


def start(log: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env |= {"PYTHONPATH": path, "RAY_FT_API_KEYS": f"tests:{KEY}", "XDG_RUNTIME_DIR": str(log.parent)}
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "ray_ft", "serve", *map(str, arguments)],
            stdout=out, stderr=subprocess.STDOUT, env=env, cwd=log.parent, start_new_session=True,
        )  # fmt: skip


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY
    while "playground:" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def command_line(process: psutil.Process) -> str:
    """Empty where the process has ended, which it may do at any time."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie is one too
        return ""


def connections(process: psutil.Process) -> list[Any]:
    """Its sockets of TCP; none where it has ended, which it may do at any time."""
    try:
        return list(process.net_connections("tcp"))
    except psutil.Error:
        return []


def with_children(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Also those whose environment says nothing: Ray's agents and workers write their title over it."""
    found = {process.pid: process for process in processes}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def living(processes: list[psutil.Process], seconds: float = 30) -> list[str]:
    """Those that have not ended within so many seconds: what was killed may take a busy machine some."""
    until = time.monotonic() + seconds
    while (found := _living(processes)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _living(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Who inherits the orphans here may not collect them; a zombie holds nothing.
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
    return found


def end(process: subprocess.Popen[bytes], processes: list[psutil.Process]) -> None:
    """After a failed test: nothing of it may stay."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    processes: list[psutil.Process]
    log: Path
    url: str

    @property
    def port(self) -> str:
        return self.url.split(":")[2].split("/")[0]

    @property
    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=self.url, api_key=KEY, timeout=60, max_retries=0)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str | Path) -> Iterator[Served]:
    """Serve on a free port until the block ends; the output goes to `out.txt` in `folder`."""
    log, port = folder / "out.txt", free_port()
    process = start(log, *arguments, "--port", str(port))
    processes: list[psutil.Process] = []
    try:
        wait_ready(process, log)
        processes = descendants(process)
        yield Served(process, processes, log, f"http://127.0.0.1:{port}/v1")
    finally:
        end(process, processes or descendants(process))


def update(served: Served, run: Path, seconds: float = READY) -> subprocess.CompletedProcess[str]:
    """`ray-ft serve RUN --update` to its end, which comes within so many seconds."""
    log = served.log.with_name("update.txt")
    process = start(log, run, "--update", "--port", served.port)
    try:
        process.wait(seconds)
    finally:
        end(process, descendants(process))
    return subprocess.CompletedProcess([], process.returncode, log.read_text())
