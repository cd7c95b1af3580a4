"""The test bed itself: hosts that are apart, faults that Ray notices, and nothing left behind."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import inside, process, testbed
from .testbed import HEALTH, Bed, BedError

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(900)]
#: Seconds in which the head has to know of a lost node, by the limits that it was given; what a busy machine adds.
NOTICED = 1 + HEALTH["health_check_failure_threshold"] * (
    (HEALTH["health_check_period_ms"] + HEALTH["health_check_timeout_ms"]) / 1000
)
BUSY = 60


@pytest.fixture(scope="module")
def shared(multihost: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def bed(shared: Path) -> Iterator[Bed]:
    with Bed(hosts=3, share=[shared]) as bed:
        yield bed


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"still not after {seconds} s"
        time.sleep(0.05)
    return answer


def alive(bed: Bed) -> dict[str, str]:
    """Address → id of the nodes that Ray calls alive."""
    return {node["address"]: node["id"] for node in bed.nodes() if node["alive"]}


def test_hosts_meet_by_address_and_by_name(bed: Bed) -> None:
    serve = "import socket; s = socket.create_server(('', 7000)); c, who = s.accept(); c.sendall(who[0].encode())"

    def answers(ask: str) -> bool:
        return bed.shell(2, [sys.executable, "-c", ask]).stdout.strip() == bed.address(2)

    for name in (bed.address(1), bed.host_name(1)):
        server = bed.shell(1, [sys.executable, "-c", serve], background=True)
        ask = f"import socket; print(socket.create_connection(('{name}', 7000)).recv(99).decode())"
        until(functools.partial(answers, ask))
        assert server.wait(60) == 0
    assert bed.shell(1, "hostname").stdout.strip() == bed.host_name(1)


def test_a_host_sees_its_own_processes_and_folders(bed: Bed, shared: Path) -> None:
    seen = bed.shell(1, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert "raylet" in seen
    assert "gcs_server" not in seen
    assert bed.processes(0, "gcs_server")
    assert not bed.processes(1, "gcs_server")
    assert os.getpid() not in bed.processes(1)
    for folder in ("/tmp", "/dev/shm"):
        assert bed.shell(1, f"echo here > {folder}/of-host-1").returncode == 0
        assert bed.shell(2, f"test -e {folder}/of-host-1").returncode == 1
        assert not Path(folder, "of-host-1").exists()
    too_much = bed.shell(1, "head -c 300M /dev/zero > /dev/shm/large; rm /dev/shm/large")
    assert "No space left" in too_much.stderr
    bed.shell(1, f"echo of host 1 > {shared}/file")
    assert bed.shell(2, f"cat {shared}/file").stdout == "of host 1\n"
    assert (shared / "file").read_text() == "of host 1\n"
    assert bed.shell(2, f"test -e {inside.REPOSITORY}/pyproject.toml").returncode == 0


def test_a_command_in_the_background_can_be_signalled(bed: Bed) -> None:
    running = bed.shell(1, ["sleep", "1000"], background=True)
    assert running.poll() is None
    until(lambda: running.pid in bed.processes(1, "^sleep 1000"))  # it begins as a copy of what starts it
    running.signal(signal.SIGTERM)
    assert running.wait(60) == 143
    said = bed.shell(1, "echo $WORD; exit 3", env={"WORD": "yes"}, background=True)
    assert said.wait(60) == 3
    assert said.output() == "yes\n"


def test_ray_asks_for_the_token(bed: Bed) -> None:
    ask = [sys.executable, "-c", testbed.NODES + "print(sum(node['alive'] for node in table()))"]
    assert bed.shell(1, ask).stdout.strip() == "3"
    refused = bed.shell(1, ask, env={"RAY_AUTH_MODE": "disabled"})
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


def test_ray_notices_faults_and_what_comes_back(bed: Bed) -> None:
    first = alive(bed)
    assert sorted(first) == [bed.address(host) for host in range(3)]

    def returned(host: int, before: dict[str, str]) -> bool:
        """Whether the host is alive as another node than before."""
        return alive(bed).get(bed.address(host), before[bed.address(host)]) != before[bed.address(host)]

    # A host loses its network, and only falls silent. Meanwhile another one loses its raylet, and starts a new one.
    bed.cut(2)
    began = time.monotonic()
    os.kill(bed.raylet(1), signal.SIGKILL)
    until(lambda: bed.address(2) not in alive(bed), NOTICED + BUSY)
    assert time.monotonic() - began > HEALTH["health_check_timeout_ms"] / 1000  # by missing answers, not by a goodbye
    assert bed.processes(2, "raylet/raylet ")  # on the side that was cut off, life goes on
    bed.heal(2)
    until(lambda: returned(1, first), testbed.NODES_SECONDS)
    # A host loses its power, and meanwhile the one that was cut off finds that it has been given up.
    second = alive(bed)
    bed.kill(1)
    assert bed.hosts[1] is None
    with pytest.raises(BedError, match="host 1 is down"):
        bed.processes(1)
    until(lambda: bed.address(1) not in alive(bed), NOTICED + BUSY)
    bed.start_host(1)
    nodes = bed.wait_nodes(3)
    # As Ray knew them: three of the first, the two that came back, and the one started anew; more where one took
    # several tries to come up.
    assert len(nodes) >= 6
    assert returned(1, second)
    assert returned(2, first)
    assert alive(bed)[bed.address(0)] == first[bed.address(0)]


def test_names_need_not_resolve(multihost: None) -> None:
    with Bed(hosts=2, resolve=False, ray=False) as bed:
        assert bed.shell(1, f"getent hosts {bed.host_name(1)}").returncode != 0
        assert bed.shell(1, "hostname").stdout.strip() == bed.host_name(1)
        assert bed.shell(1, f"timeout 5 bash -c 'echo > /dev/tcp/{bed.address(0)}/9'").stderr.count("refused")
        bed.cut(0)
        assert bed.shell(1, f"timeout 1 bash -c 'echo > /dev/tcp/{bed.address(0)}/9'").returncode == 124  # silence


OWNER = """
import json, sys, time
from tests.multihost.testbed import Bed
bed = Bed(hosts=2, ray=False)
bed.start()
sleeping = bed.shell(1, "sleep 1000 & exec -a escaped setsid sleep 1000", background=True)
while len(found := bed.processes(1, "^(sleep|escaped) ")) < 2:
    time.sleep(0.05)
print(json.dumps([bed.name, bed._state["switch"], bed.hosts, found]), flush=True)
time.sleep(1000)
"""


def machine() -> tuple[str, str]:
    """The machine's own links and mounts."""
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, check=True).stdout
    return links, Path("/proc/self/mounts").read_text()


def namespaces(pid: int) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "mnt", "uts", "ipc", "pid")}


def in_use() -> set[str]:
    """Namespaces of all processes."""
    found: set[str] = set()
    for pid in process.pids():
        try:
            found |= namespaces(pid)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("victims", ["owner", "keeper and owner"])
def test_nothing_is_left_when_the_owner_is_killed(multihost: None, victims: str) -> None:
    before = machine()
    command = [sys.executable, "-c", OWNER]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=inside.REPOSITORY)
    assert owner.stdout is not None
    name, switch, hosts, sleeping = json.loads(owner.stdout.readline())
    folder = testbed.ROOT / name
    keeper = json.loads((folder / "keeper.json").read_text())["pid"]
    processes = [switch, keeper, *hosts, *sleeping]
    assert len(sleeping) == 2
    assert all(map(process.began, processes))
    assert machine() == before  # nothing in the machine's own network and mounts, even while it runs
    spaces = set().union(*(namespaces(pid) for pid in (switch, *hosts))) - namespaces(os.getpid())
    assert len(spaces) == 3 + 2 * 5
    if victims == "keeper and owner":
        os.kill(keeper, signal.SIGKILL)
    owner.kill()
    owner.wait()
    until(lambda: not any(map(process.began, processes)))
    until(lambda: not spaces & in_use())
    assert machine() == before
    if victims == "owner":
        until(lambda: not folder.exists())
    else:
        assert name in testbed.sweep()
        assert not folder.exists()


def test_a_bed_by_hand_lives_until_it_is_stopped(multihost: None) -> None:
    name = f"by-hand-{os.getpid()}"

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tests.multihost.testbed", *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=inside.REPOSITORY, check=False)

    assert command("start", name, "--hosts", "2", "--no-ray").returncode == 0
    try:
        assert name in command("list").stdout.split()
        assert name not in testbed.sweep()
        assert command("shell", name, "1", "hostname").stdout.strip() == "bed-host1"
        assert "tests.multihost.inside" in command("ps", name, "0").stdout
        assert command("kill", name, "1").returncode == 0
        assert "host 1 is down" in command("shell", name, "1", "true").stderr
        assert command("revive", name, "1").returncode == 0
        for verb in ("cut", "heal"):
            assert command(verb, name, "1").returncode == 0
        assert "is a bed" in command("start", name).stderr
    finally:
        assert command("stop", name).returncode == 0
    assert name not in testbed.names()
    assert "no bed" in command("shell", name, "0").stderr
