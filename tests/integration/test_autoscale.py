"""On a cluster of its own that starts without workers and whose autoscaler makes processes in place of machines, as
many trials run at once as `trials_at_once` says, and no more.

Some 40 s on two cores. The driver is a process of its own: Ray keeps a cluster's token for the life of a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from growing import Growing

from ray_ft import recipe, session
from ray_ft.errors import ResourceError
from ray_ft.placement import refuse_impossible
from ray_ft.placement.capacity import Need, Nodes, cluster, trials_at_once
from ray_ft.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TYPES = {
    "small": {"resources": {"CPU": 2}, "max_workers": 2},
    "gpus": {"resources": {"CPU": 2, "GPU": 4}, "max_workers": 1},
}


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    """What `look` saw on a cluster that may have two workers: `small` ones of 2 CPUs, or one of 4 GPUs among them."""
    with Growing(TYPES, max_workers=2) as grown:
        driver = subprocess.run(
            [sys.executable, __file__], env=grown.env(), capture_output=True, text=True, timeout=500, check=False
        )
        assert driver.returncode == 0, driver.stderr + grown.output()
        yield json.loads(driver.stdout.splitlines()[-1])


def test_nodes_that_may_come_count(seen: dict[str, Any]) -> None:
    assert seen["nodes"] == [
        [{}, 1, "", None],
        [{"CPU": 2}, 2, "small", 2],
        [{"CPU": 2, "GPU": 4}, 1, "gpus", 2],
    ]
    assert seen["fit"] == {"on CPUs": 2, "on half CPUs": 8, "on GPUs": 1}


def test_more_gpus_than_any_node_has_are_refused(seen: dict[str, Any]) -> None:
    assert "train.workers = 8" in seen["refused"] and "room for 4" in seen["refused"] and "'gpus'" in seen["refused"]


def test_a_run_that_can_never_be_placed_is_refused_within_seconds(seen: dict[str, Any]) -> None:
    print(f"two checks took {seen['seconds']:.2f} s")
    assert "train.workers = 8" in seen["run refused"] and "room for 4" in seen["run refused"]
    assert seen["run let in"] is None
    assert seen["seconds"] < 10


def test_so_many_get_their_place_and_no_more(seen: dict[str, Any]) -> None:
    assert seen["placed"] == [True, True]
    assert seen["one more"] is False


def test_nodes_that_came_are_not_counted_twice(seen: dict[str, Any]) -> None:
    assert seen["alive"] == 3
    assert seen["grown"] == seen["nodes"]
    assert seen["said"] == []


def test_another_nodes_driver_asks_the_head(seen: dict[str, Any]) -> None:
    assert seen["from a worker"] == seen["nodes"]


def test_the_cluster_shrinks_when_trials_are_over(seen: dict[str, Any]) -> None:
    assert seen["left"] == 1


def facts(nodes: list[Nodes]) -> list[Any]:
    return [[kind.resources, kind.count, kind.name, kind.together] for kind in nodes]


def a_recipe(train: dict[str, Any]) -> Recipe:
    content = {
        "run": {"name": "x", "storage": "/nowhere"},
        "model": {"path": "/nowhere"},
        "data": {"train": [{"path": "/nowhere/*.jsonl", "format": "translation"}], "seq_len": 8},
        "train": {"global_batch": 8, **train},
    }
    return recipe.parse(content)


def look() -> dict[str, Any]:
    """What a driver sees: before any worker is there, while trials hold them all, and afterwards."""
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    said: list[str] = []
    nodes = cluster(said.append)
    needs = {"on CPUs": Need(1, 2, 0), "on half CPUs": Need(1, 0.5, 0), "on GPUs": Need(4, 0.25, 1, reading=1)}
    seen: dict[str, Any] = {
        "nodes": facts(nodes),
        "fit": {name: trials_at_once([need], nodes, None) for name, need in needs.items()},
    }
    try:
        trials_at_once([Need(8, 0.25, 1)], nodes, None)
    except ResourceError as error:
        seen["refused"] = str(error)
    began = time.monotonic()
    for overrides, key in (({"workers": 8, "device": "cuda"}, "run refused"), ({"workers": 4}, "run let in")):
        try:
            seen[key] = refuse_impossible(a_recipe({"cpus_per_worker": 0.25, **overrides}), said.append)
        except ResourceError as error:
            seen[key] = str(error)
    seen["seconds"] = time.monotonic() - began
    groups = [placement_group([{"CPU": 2}]) for _ in range(seen["fit"]["on CPUs"])]
    seen["placed"] = [group.wait(120) for group in groups]
    groups.append(placement_group([{"CPU": 2}]))
    seen["one more"] = groups[-1].wait(4)
    seen["alive"] = sum(node["Alive"] for node in ray.nodes())
    seen["grown"] = facts(cluster(said.append))
    there = PlacementGroupSchedulingStrategy(groups[0])
    seen["from a worker"] = ray.get(
        ray.remote(num_cpus=1)(lambda: facts(cluster())).options(scheduling_strategy=there).remote()
    )
    for group in groups:
        remove_placement_group(group)
    until = time.monotonic() + 120
    while (left := sum(node["Alive"] for node in ray.nodes())) > 1 and time.monotonic() < until:
        time.sleep(0.5)
    return {**seen, "left": left, "said": said}


if __name__ == "__main__":
    with session.connected():
        print(json.dumps(look()))
