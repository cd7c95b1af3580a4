"""Network faults of real hosts, found by name: a slow link, another MTU, a host name that leads nowhere or elsewhere.

One bed, and one driver on its head that is asked again and again; each test puts back what it breaks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from .testbed import Bed

pytestmark = [pytest.mark.multihost, pytest.mark.slow, pytest.mark.timeout(600)]

DRIVER = """
import dataclasses, json, sys
from ray_ft import session
from ray_ft.doctor import fabric, network, probe
with session.connected():
    for line in sys.stdin:
        answers = probe.ask(probe.nodes(), network.look)
        errors = {name: answer.error for name, answer in answers.items() if answer.error}
        nodes = {name: answer.value for name, answer in answers.items() if not answer.error}
        findings = network.check(nodes)
        measured = fabric.measure(lambda line: None) if json.loads(line) else None
        findings += fabric.check(measured, nodes) if measured else []
        said = [dataclasses.asdict(finding) for finding in findings]
        answer = {"errors": errors, "measured": measured, "nodes": nodes, "findings": said}
        print(json.dumps(answer), flush=True)
"""


class Asked:
    """A bed, and the driver on its head."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.driver = subprocess.Popen(
            [*bed.enter(0), sys.executable, "-c", DRIVER],
            env=bed.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def look(self, *, measure: bool = False) -> dict[str, Any]:
        """What the doctor's network part finds."""
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(json.dumps(measure) + "\n")
        self.driver.stdin.flush()
        line = self.driver.stdout.readline()
        assert line, f"the driver ended with {self.driver.wait(60)}"
        answer: dict[str, Any] = json.loads(line)
        assert answer["errors"] == {}
        return answer

    def run(self, host: int, command: str) -> None:
        done = self.bed.shell(host, command)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def asked(multihost: None) -> Iterator[Asked]:
    with Bed(hosts=3, cpus=1) as bed:
        asked = Asked(bed)
        yield asked
        assert asked.driver.stdin is not None
        asked.driver.stdin.close()
        assert asked.driver.wait(120) == 0


def warned(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and places of the findings that are worse than a note."""
    return sorted((finding["name"], finding["where"]) for finding in answer["findings"] if finding["severity"] > 1)


def test_a_healthy_bed_and_a_slow_link(asked: Asked) -> None:
    well = asked.look(measure=True)
    assert warned(well) == []
    assert [node["address"] for node in well["measured"]["nodes"]] == [asked.bed.address(host) for host in range(3)]
    assert {facts["chosen"] for facts in well["nodes"].values()} == {"eth0"}
    assert len(well["measured"]["pairs"]) == 3
    asked.run(2, "tc qdisc add dev eth0 root tbf rate 50mbit burst 64kb latency 100ms")
    try:
        ill = asked.look(measure=True)
    finally:
        asked.run(2, "tc qdisc del dev eth0 root")
    assert warned(ill) == [("fabric.node", asked.bed.address(2))]
    (speed,) = (
        its
        for one, other, its in ill["measured"]["pairs"]
        if {one, other} == {asked.bed.address(0), asked.bed.address(2)}
    )
    assert 3e6 < speed < 8e6  # bytes a second, of 50 megabits
    assert ill["measured"]["all_reduce"][-1]["busbw"] < 8e6


def test_another_mtu(asked: Asked) -> None:
    asked.run(1, "ip link set eth0 mtu 1400")
    try:
        assert warned(asked.look()) == [("network.mtu", asked.bed.address(1))]
    finally:
        asked.run(1, "ip link set eth0 mtu 1500")


def test_host_names(asked: Asked) -> None:
    right = asked.bed.host_name(2)
    asked.run(2, "hostname nobody-knows-me")
    try:
        answer = asked.look()
        assert warned(answer) == [("network.names", asked.bed.address(2))]
        (said,) = [finding["what"] for finding in answer["findings"] if finding["severity"] > 1]
        assert "nobody-knows-me, does not resolve" in said
        asked.run(2, f"hostname {asked.bed.host_name(1)}")  # another's
        assert ("network.names", asked.bed.address(2)) in warned(asked.look())
    finally:
        asked.run(2, f"hostname {right}")


def test_a_host_that_drops_connections(asked: Asked) -> None:
    """Packets to one host from another vanish; to the head they pass, so Ray takes both for alive."""
    asked.run(1, f"ip route add blackhole {asked.bed.address(2)}/32")
    try:
        answer = asked.look(measure=True)
    finally:
        asked.run(1, f"ip route del blackhole {asked.bed.address(2)}/32")
    names = {name for name, _ in warned(answer)}
    assert names == {"network.reach", "fabric.reach"}
    assert asked.bed.address(1) in {where for _, where in warned(answer)}
    assert answer["measured"]["blocked"][asked.bed.address(1)].keys() == {asked.bed.address(2)}
