"""The doctor on several hosts: nothing is wrong with a well cluster, and each fault planted in another is named."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from ray_ft.demo import PROMPT, DemoPaths, write_demo

from .testbed import NODES_SECONDS, Bed

pytestmark = [pytest.mark.multihost, pytest.mark.slow, pytest.mark.timeout(600)]
SITE = Path(ray.__file__).parents[1]
#: Runs on host 1 at the start of each Python process: its clock is 90 s ahead.
AHEAD = "import time; real = time.time; time.time = lambda: real() + 90\n"


@pytest.fixture(scope="module")
def shared(multihost: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def demo_files(shared: Path) -> DemoPaths:
    return write_demo(str(shared / "demo"), rows=60, hidden_size=32, layers=2)


@pytest.fixture(scope="module")
def recipe(shared: Path, demo_files: DemoPaths) -> Path:
    rows = {"format": "translation", "prompt": PROMPT}
    content = {
        "run": {"name": "bed", "storage": str(shared / "runs")},
        "model": {"path": demo_files.base},
        "data": {"train": [{"path": list(demo_files.train), **rows}], "seq_len": 128},
        "train": {"strategy": "fsdp", "workers": 2, "global_batch": 8, "micro_batch": 4},
    }
    file = shared / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def bed(shared: Path, recipe: Path) -> Iterator[Bed]:
    with Bed(hosts=3, cpus=2, share=[shared]) as bed:
        yield bed


def doctor(bed: Bed, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status of `ray-ft doctor` on the head, and what is not well, by name."""
    done = bed.shell(0, [sys.executable, "-m", "ray_ft", "doctor", *words, "--json"], timeout=240)
    assert done.stdout.startswith("{"), done.stderr
    answer = json.loads(done.stdout)
    print(json.dumps(answer, indent=1))
    return done.returncode, {one["name"]: one for one in answer["findings"] if one["severity"] in ("warning", "error")}


def run(bed: Bed, host: int, *commands: str) -> None:
    for command in commands:
        done = bed.shell(host, command)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_a_well_cluster_has_nothing(bed: Bed, recipe: Path, shared: Path) -> None:
    began = time.monotonic()
    assert doctor(bed, str(recipe), "--quick") == (0, {})
    print(f"quick: {time.monotonic() - began:.1f} s with the start of the command")
    assert doctor(bed, str(recipe)) == (0, {})
    assert doctor(bed)[0] == 0  # no recipe: a note, and nothing else
    assert not list((shared / "runs").glob(".doctor-*"))


def test_impossible_workers_and_storage_of_each_node(bed: Bed, recipe: Path) -> None:
    status, bad = doctor(bed, str(recipe), "--quick", "train.cpus_per_worker=64", "run.storage=/tmp/of-each-host")
    assert status == 2
    assert set(bad) == {"placement.workers", "storage.shared"}
    assert "64 CPUs" in bad["placement.workers"]["what"]
    assert bad["storage.shared"]["where"] == ", ".join(bed.address(host) for host in range(3))
    for host in range(3):
        assert bed.shell(host, "ls -A /tmp/of-each-host").stdout == ""


def test_each_planted_fault_is_named(bed: Bed, recipe: Path, shared: Path, demo_files: DemoPaths) -> None:
    first, second = bed.address(1), bed.address(2)
    # Host 1: another transformers, another clock, no model, a token that all may read.
    info = next(SITE.glob("transformers-*.dist-info"))
    plant = shared / "plant"
    (plant / info.name).mkdir(parents=True)
    metadata = (info / "METADATA").read_text().splitlines()
    changed = ["Version: 5.18.0" if line.startswith("Version: ") else line for line in metadata]
    (plant / info.name / "METADATA").write_text("\n".join(changed))
    (plant / "bed_clock.py").write_text(AHEAD)
    (plant / "bed-clock.pth").write_text("import bed_clock\n")
    token = bed.folder / "token"
    run(
        bed,
        1,
        f"mount -t overlay planted -o lowerdir={plant}:{SITE} {SITE}",
        f"mount -t tmpfs no-model {shlex.quote(demo_files.folder)}",
        f"cp {token} /tmp/token && chmod 644 /tmp/token && mount --bind /tmp/token {token}",
    )
    # Host 2: storage for reading only, no shared memory and no disk left, names of others unknown.
    runs = shared / "runs"
    run(
        bed,
        2,
        f"mount --bind {runs} {runs} && mount -o remount,ro,bind {runs}",
        "mount -o remount,size=$(( $(df --output=used -k /dev/shm | tail -1) + 20000 ))k /dev/shm",
        "fallocate -l 300M /tmp/large",
        "mount -o remount,size=$(( $(df --output=used -k /tmp | tail -1) * 100 / 97 ))k /tmp",
        "echo 127.0.0.1 localhost > /tmp/names && mount --bind /tmp/names /etc/hosts",
    )
    restart(bed, 1)
    found = {
        "versions.transformers": first,
        "clock.skew": first,
        "model.reachable": first,
        "auth.token_file": first,
        "storage.writable": second,
        "room.shm": second,
        "room.disk": second,
        "network.names": second,
    }
    for part in ((), ("--quick",)):
        status, bad = doctor(bed, str(recipe), *part)
        assert status == 2
        assert {name: one["where"] for name, one in bad.items()} == found
    assert "5.18.0" in bad["versions.transformers"]["what"]
    assert "90" in bad["clock.skew"]["what"]


def restart(bed: Bed, host: int) -> None:
    """Ray on the host starts anew, and with it all that it started."""
    before = {node["id"] for node in bed.nodes()}
    os.kill(bed.raylet(host), signal.SIGKILL)
    end = time.monotonic() + NODES_SECONDS
    while not any(n["address"] == bed.address(host) and n["alive"] and n["id"] not in before for n in bed.nodes()):
        assert time.monotonic() < end, bed.logs()
        time.sleep(0.5)


def test_a_cluster_without_a_token_is_named(
    shared: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where no token lies that Ray would take
    with Bed(hosts=2, token=False, share=[shared, tmp_path]) as bed:
        status, bad = doctor(bed, str(recipe), "train.workers=1")
        assert status == 1
        assert set(bad) == {"auth.token"}
        assert "answers without a token" in bad["auth.token"]["what"]
