"""The measurement's way through a node with GPUs, on a Ray that is told that it has three: one of them is in use.

There are no GPUs here, so each rank meets the others by gloo and writes down what NCCL would. Which GPUs take part,
what the ranks are asked, and that NCCL's refusal is a finding, is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LOG = """
n:1:1 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
n:1:1 [0] NCCL INFO Using network Socket
n:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""
DRIVER = """
import dataclasses, json, time
from ray_ft import session
session.import_ray_for("")
import ray
from ray_ft.doctor import fabric, network

class Pretended(fabric.Rank):
    def join(self, address, port, rank, world, backend):
        assert backend == "nccl" and len(ray.get_gpu_ids()) == 1
        super().join(address, port, rank, world, "gloo")
    def log(self):
        self._log.write_text(LOG)
        return super().log()

@ray.remote(num_gpus=1, num_cpus=0)
class Other:
    def is_there(self):
        return True

def until_free(count):
    "What is taken is known with the node's next report."
    (node,) = ray.nodes()
    end = time.monotonic() + 60
    while fabric._free_gpus(node["NodeID"]) != count:
        assert time.monotonic() < end
        time.sleep(0.05)

with session.connected():
    other = Other.remote()
    assert ray.get(other.is_there.remote())
    until_free(2)
    nodes = {"this": network.look()}
    fabric.SIZES["nccl"] = (1 << 16, 1 << 20)
    refused = fabric.measure(print)
    fabric.Rank = Pretended
    measured = fabric.measure(print)
    said = [[dataclasses.asdict(f) for f in fabric.check(m, nodes)] for m in (refused, measured)]
    more = [Other.remote() for _ in range(2)]
    assert all(ray.get([one.is_there.remote() for one in more]))
    until_free(0)
    full = fabric.measure(print)
print(json.dumps({"refused": refused, "measured": measured, "full": full, "said": said}))
"""


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    environment = os.environ | {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 3}), "RAY_ADDRESS": "local"}
    command = [sys.executable, "-c", f"LOG = {LOG!r}\n{DRIVER}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines: list[str] = done.stdout.splitlines()
    assert lines[0] == "measuring the network: 2 GPUs on 1 nodes, by nccl"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_nccl_that_does_not_start_is_a_finding(answer: dict[str, Any]) -> None:
    assert answer["refused"]["failed"]["step"] == "join"
    (said,) = answer["said"][0]
    assert said["name"] == "fabric.connect"
    assert "nccl" in said["what"].lower()


def test_free_gpus_take_part(answer: dict[str, Any]) -> None:
    measured = answer["measured"]
    (node,) = measured["nodes"]
    assert node["ranks"] == 2  # one of three is in use
    assert [row["bytes"] for row in measured["all_reduce"]] == [1 << 16, 1 << 20]
    assert measured["within"] == {node["address"]: measured["all_reduce"][-1]["busbw"]}
    assert measured["pairs"] == []  # there is one node
    log = measured["logs"][node["address"]]
    assert (log["version"], log["channels"]) == ("2.28.9", {"P2P": 2})  # of both ranks
    (said,) = answer["said"][1]
    assert said["name"] == "fabric.bandwidth"
    assert said["severity"] == 0


def test_gpus_that_are_all_in_use_are_left_out(answer: dict[str, Any]) -> None:
    full = answer["full"]
    assert list(full["skipped"].values()) == ["all its GPUs are in use"]
    assert full["nothing"]
