"""Verbs as jobs on a real head: sent, followed through a lost connection and a dashboard that is started again, stopped
with a checkpoint, continued; and the plain `ray job submit`.

Some six minutes on two busy cores. For the jobs, ray-ft comes from the working directory that is sent: the copy says so
itself.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import Head
from ports import free_ports

from ray_ft.demo import PROMPT, DemoPaths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
#: More than are taken while commands are typed, however slowly: the run is to be stopped in the middle.
STEPS = 20_000
#: Appended to the copy: where it came from, and which GPUs it may see.
SAYS = "\nimport os, sys\nprint('ray_ft at', __file__, 'GPUs', repr(os.environ.get('CUDA_VISIBLE_DEVICES')))\n"


class Project:
    """A working directory, and the verbs called in it."""

    def __init__(self, head: Head, folder: Path, demo: DemoPaths) -> None:
        self.head, self.folder, self.runs = head, folder / "project", folder / "runs"
        for name in ("ray_ft", "jobs", "serving"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        with open(self.folder / "ray_ft" / "__init__.py", "a") as file:
            file.write(SAYS)
        rows = {"format": "translation", "prompt": PROMPT}
        recipe = {
            "run": {"name": "words", "storage": str(self.runs)},
            "model": {"path": demo.base},
            "data": {"train": [{"path": list(demo.train), **rows}], "seq_len": 128},
            "train": {
                "strategy": "none", "workers": 1, "cpus_per_worker": 1, "global_batch": 8, "micro_batch": 4,
                "max_steps": STEPS, "checkpoint": {"every": 1000},
            },
        }  # fmt: skip
        (self.folder / "recipe.yaml").write_text(json.dumps(recipe))

    def start(self, *arguments: str, address: str | None = None, token: bool = True) -> subprocess.Popen[str]:
        ray_ft = str(Path(sys.executable).parent / "ray-ft")  # the installed one
        return subprocess.Popen(
            [ray_ft, *arguments, "--address", address or self.head.dashboard],
            cwd=self.folder, env=self.head.env(token, WORDS_NOTE="hello"), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def call(self, *arguments: str, token: bool = True) -> tuple[int, str]:
        process = self.start(*arguments, token=token)
        out = process.communicate(timeout=500)[0]
        return process.returncode, out

    def text(self, job: str) -> str:
        return (self.head.logs / f"job-driver-{job}.log").read_text()

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.runs / "words" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def project(head: Head, demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(head, tmp_path_factory.mktemp("submit"), demo)


class Line:
    """A way to the dashboard that can be cut: connections break off, and new ones are refused until it is mended."""

    def __init__(self, port: int) -> None:
        self._port, self._pairs = port, list[socket.socket]()
        (self.port,) = free_ports(1)  # one that nobody takes while the line is cut
        self._listen()

    def _listen(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            try:
                other = socket.create_connection(("127.0.0.1", self._port))
            except OSError:  # the dashboard is away
                one.close()
                continue
            self._pairs += [one, other]
            for source, sink in ((one, other), (other, one)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            one.close()

    def cut(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in self._pairs:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._pairs.clear()

    def mend(self) -> None:
        self._listen()


@pytest.fixture
def line(head: Head) -> Iterator[Line]:
    one = Line(int(head.dashboard.rpartition(":")[2]))
    yield one
    one.cut()


def printed(text: str) -> list[str]:
    """What the job itself printed, without Ray's own two lines."""
    return [line for line in text.splitlines() if "job_manager.py" not in line and "Running entrypoint" not in line]


def test_a_run_is_followed_stopped_and_continued(project: Project, line: Line) -> None:
    code, out = project.call("submit", "train", "recipe.yaml", "--detach", "--env", "WORDS_NOTE")
    assert code == 0, out
    assert "submitted train-words-1 to" in out and "MiB to send" in out and "ray-ft attach train-words-1" in out
    watching = project.start("attach", "words", address=f"http://127.0.0.1:{line.port}")
    end = time.monotonic() + 400
    while not re.search(rf"^step \d+/{STEPS}", project.text("train-words-1"), re.MULTILINE):
        assert time.monotonic() < end, project.text("train-words-1")
        time.sleep(0.5)

    code, out = project.call("submit", "train", "recipe.yaml")
    assert code == 1 and "train-words-1 is at work on the run words already" in out and "ray-ft attach" in out, out

    line.cut()
    time.sleep(3)
    line.mend()
    project.head.restart_dashboard(away=2)

    code, out = project.call("stop", "words")
    assert code == 0, out
    found = re.search(rf"train-words-1 stopped after step (\d+) of {STEPS}, with a checkpoint", out)
    assert found, out
    stopped = int(found[1])
    assert 0 < stopped < STEPS
    assert list((project.runs / "words" / "checkpoints").glob(f"step_{stopped:08d}*/COMMITTED"))

    seen = watching.communicate(timeout=300)[0]
    assert watching.returncode == 143, seen
    own = ("no answer from", "connected again", "train-words-1 stopped")
    assert seen.count("connected again") >= 1, seen
    assert "working_dir_files/_ray_pkg_" in seen and "GPUs ''" in seen, seen  # as the copy says
    shown = [one for one in seen.splitlines() if not one.startswith(own)]
    assert shown == printed(project.text("train-words-1"))  # every line, once

    code, out = project.call("submit", "train", "recipe.yaml", f"train.max_steps={stopped + 20}")
    assert code == 0, out
    assert "train-words-2 succeeded" in out and "trained 20 steps" in out, out
    assert project.steps() == sorted(set(project.steps())) and project.steps()[-1] == stopped + 20

    details = json.loads(ask(project.head, "/api/jobs/train-words-1"))
    assert details["entrypoint"] == "exec python -m jobs.train recipe.yaml"
    assert details["metadata"]["ray_ft_run"] == "words" and details["metadata"]["ray_ft_storage"] == str(project.runs)
    assert details["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "WORDS_NOTE": "hello"}
    code, out = project.call("jobs")
    assert code == 0
    assert re.search(r"train-words-1\s+train\s+words\s+stopped", out) and re.search(r"train-words-2.*succeeded", out)


def test_ray_job_submit_does_the_same(project: Project) -> None:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", project.head.dashboard]
    ray += ["--working-dir", ".", "--", "python", "jobs/train.py", "nothing.yaml"]
    done = subprocess.run(
        ray, cwd=project.folder, env=project.head.env(), capture_output=True, text=True, timeout=480, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "no recipe at 'nothing.yaml'" in said and "working_dir_files/_ray_pkg_" in said and "GPUs ''" in said, said


def test_a_failed_job_ends_as_its_entry_point(project: Project) -> None:
    code, out = project.call("submit", "evaluate", str(project.runs / "nobody"))
    assert code == 1 and "evaluate-nobody-1 failed, exit status 1" in out, out
    code, out = project.call("attach", "evaluate-nobody-1")
    assert code == 1 and "no such folder" in out, out


def test_without_the_token_nobody_gets_in(project: Project) -> None:
    code, out = project.call("jobs", token=False)
    assert code == 1 and "asks for its token, and this machine has none" in out, out


def ask(head: Head, path: str) -> str:
    import urllib.request

    asked = urllib.request.Request(head.dashboard + path, headers={"Authorization": f"Bearer {head.token}"})
    return urllib.request.urlopen(asked, timeout=60).read().decode()
