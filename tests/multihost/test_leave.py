"""cluster/kuberay/setup/leave.py, which pods run before they end. Hosts of the bed stand for pods."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import inside
from .testbed import NODES_SECONDS, Background, Bed

pytestmark = [pytest.mark.multihost, pytest.mark.slow, pytest.mark.timeout(600)]
LEAVE = inside.REPOSITORY / "cluster" / "kuberay" / "setup" / "leave.py"

#: A driver with an actor on the host that is named first: it works until it is told that its node goes, then saves.
DRIVER = """
import pathlib, sys, time
import ray

@ray.remote(num_cpus=0, resources={f"node:{sys.argv[1]}": 0.001})
class Work:
    def run(self, folder):
        from ray._private.state import state

        (folder / "works").touch()
        while ray.get_runtime_context().get_node_id() not in state.get_draining_nodes():
            time.sleep(0.2)
        time.sleep(2)
        (folder / "saved").touch()

ray.init()
work = Work.remote()
ray.get(work.run.remote(pathlib.Path(sys.argv[2])))
"""
#: A job that saves when it is told to stop, as the training command does.
JOB = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(143)

folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, save)
(folder / "works").touch()
time.sleep(600)
"""


@pytest.fixture(scope="module")
def shared(multihost: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def bed(shared: Path) -> Iterator[Bed]:
    with Bed(hosts=2, share=[shared], dashboard=True) as bed:
        yield bed


def appears(file: Path, running: Background) -> None:
    end = time.monotonic() + 120
    while not file.exists():
        assert running.poll() is None, running.output()
        assert time.monotonic() < end, running.output()
        time.sleep(0.1)


def leave(bed: Bed, host: int, role: str, seconds: int) -> tuple[int, str]:
    done = bed.shell(host, [sys.executable, str(LEAVE), role, f"--seconds={seconds}"], timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_head_goes_when_its_jobs_have_saved(bed: Bed, shared: Path) -> None:
    folder = shared / "job"
    folder.mkdir()
    (folder / "job.py").write_text(JOB)
    job = ["ray", "job", "submit", "--address=http://127.0.0.1:8265", "--submission-id=saves", "--"]
    running: Background = bed.shell(0, [*job, sys.executable, f"{folder}/job.py", str(folder)], background=True)
    appears(folder / "works", running)
    status, said = leave(bed, 0, "head", 120)
    assert (status, (folder / "saved").exists()) == (0, True), said
    assert "stopping saves" in said
    assert leave(bed, 0, "head", 120)[0] == 0  # nothing is left to stop


def test_a_worker_goes_when_its_work_has_saved(bed: Bed, shared: Path) -> None:
    folder = shared / "actor"
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER)
    words = [sys.executable, f"{folder}/driver.py", bed.address(1), str(folder)]
    running: Background = bed.shell(0, words, background=True)
    appears(folder / "works", running)
    status, said = leave(bed, 1, "worker", 120)
    assert (status, (folder / "saved").exists()) == (0, True), said
    assert running.wait(180) == 0, running.output()


def test_work_that_does_not_end_is_named(bed: Bed, shared: Path) -> None:
    """Work that does not hear that its node goes."""
    folder = shared / "stays"
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER.replace("not in", "is not"))  # always true: it hears nothing
    words = [sys.executable, f"{folder}/driver.py", bed.address(0), str(folder)]
    running: Background = bed.shell(0, words, background=True)
    appears(folder / "works", running)
    status, said = leave(bed, 0, "worker", 3)
    assert status == 1, said
    assert "ray::Work" in said
    running.signal(15)


def test_a_head_that_serves_waits_for_gpus(bed: Bed, shared: Path) -> None:
    ask = [sys.executable, str(LEAVE.with_name("gpus.py"))]
    none = bed.shell(0, ask, timeout=120)
    assert (none.returncode, none.stdout) == (1, "nodes with GPUs: none yet\n"), none.stderr
    # Ray ends a node that is not up after 30 s; on a busy machine it takes several tries.
    start = f"ray start --address={bed.address(0)}:6379 --num-gpus=1 --block"
    bed.shell(1, f"while true; do {start}; sleep 1; done", background=True)
    end = time.monotonic() + NODES_SECONDS
    while (found := bed.shell(0, ask, timeout=120)).returncode:
        assert time.monotonic() < end, found.stdout + found.stderr
    assert found.stdout == f"nodes with GPUs: {bed.address(1)}\n"
