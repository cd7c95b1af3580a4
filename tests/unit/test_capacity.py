"""How many trials run at once: packed against every way to place them, and the limits of autoscalers read."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ft import session
from ray_ft.errors import ResourceError
from ray_ft.placement import nodes as module
from ray_ft.placement.capacity import MOST, Need, Nodes, cluster, on_gpus, trials_at_once
from ray_ft.recipe import Recipe

BOX = Nodes({"CPU": 32, "GPU": 8}, 1, "box")


# ----------------------------------------------------------------------------------------------------------- the need


def test_what_a_trial_needs(make_recipe: Callable[..., Recipe]) -> None:
    assert Need.of(make_recipe("train.cpus_per_worker=2"), False) == Need(1, 2, 0, (1,), 0)
    workers = make_recipe("train.workers=2", "train.global_batch=8")
    assert Need.of(workers, True) == Need(2, 1, 1, (2,), session.SPARE_CPUS)
    elastic = make_recipe("train.workers=[1,4]", "train.micro_batch=1", "train.global_batch=8")
    assert Need.of(elastic, False) == Need(4, 1, 0, (1, 2, 4), session.SPARE_CPUS)


def test_device_auto_takes_gpus_that_may_come(make_recipe: Callable[..., Recipe]) -> None:
    laptop = [Nodes({"CPU": 2}, 1)]
    growing = [*laptop, Nodes({"CPU": 8, "GPU": 1}, 4, "gpus", together=4)]
    auto, cpu, cuda = (make_recipe(f"train.device={device}") for device in ("auto", "cpu", "cuda"))
    assert [on_gpus(auto, laptop), on_gpus(auto, growing)] == [False, True]
    assert [on_gpus(cpu, growing), on_gpus(cuda, laptop)] == [False, True]


# -------------------------------------------------------------------------------------------------------- the packing


@pytest.mark.parametrize(
    ("need", "nodes", "expected"),
    [
        (Need(2, 4, 1, reading=1), [BOX], 3),  # 4 × 2 GPUs are there, but 4 × 9 CPUs are not
        (Need(2, 3, 1, reading=1), [BOX], 4),
        (Need(1, 1, 0), [Nodes({"CPU": 3}, 1, spare_cpus=1)], 2),  # two cores train two trials, not three
        (Need(1, 1, 0, reading=1), [Nodes({"CPU": 3}, 1, spare_cpus=1)], 1),
        (Need(2, 1, 0, reading=1), [Nodes({"CPU": 3}, 1, spare_cpus=1)], 1),
        (Need(3, 1, 0), [Nodes({"CPU": 2}, 3)], 2),  # a trial's workers may lie on two nodes
        (Need(1, 2, 0), [Nodes({"CPU": 3}, 3)], 3),  # but no worker does: 9 CPUs hold 3, not 4
        (Need(4, 1, 1, reading=1), [Nodes({"CPU": 4}, 1), Nodes({"CPU": 8, "GPU": 8}, 100, "g", together=6)], 10),
        # The autoscaler's limit is over all kinds: the larger nodes are taken, and one for what reads data.
        (Need(2, 1, 1), [Nodes({"CPU": 2, "GPU": 1}, 9, "a", 2), Nodes({"CPU": 2, "GPU": 2}, 1, "b", 2)], 1),
        (Need(2, 1, 1, reading=1), [Nodes({"CPU": 2, "GPU": 2}, 9, "a", 2), Nodes({"CPU": 1}, 9, "b", 2)], 1),
        # What reads data goes where it takes no worker's place, and workers where it would find none.
        (Need(3, 1.5, 0, reading=1), [Nodes({"CPU": 6}, 2), Nodes({"CPU": 8}, 2)], 5),
        (Need(1, 1, 1, reading=1), [Nodes({"CPU": 2, "GPU": 2}, 1), Nodes({"CPU": 2}, 1)], 2),
        (Need(4, 0.1, 0), [Nodes({"CPU": 1.2}, 1)], 3),  # 1.2 ÷ 0.1 is 11.99… in floating point
    ],
)
def test_trials_are_packed_worker_by_worker(need: Need, nodes: list[Nodes], expected: int) -> None:
    assert trials_at_once([need], nodes, None) == expected


def test_no_more_than_wanted_and_no_more_than_fit() -> None:
    need = Need(1, 1, 1)
    assert [trials_at_once([need], [BOX], wanted) for wanted in (1, 5, 8, 9, None)] == [1, 5, 8, 8, 8]
    assert trials_at_once([need], [Nodes({"CPU": 8, "GPU": 8}, 1 << 20)], None) == MOST


def test_an_elastic_trial_counts_with_the_most_workers_that_fit() -> None:
    need = Need(16, 1, 1, sizes=(2, 4, 8, 16))
    assert trials_at_once([need], [BOX], None) == 1
    assert trials_at_once([need], [Nodes({"CPU": 8, "GPU": 4}, 7)], None) == 1  # 16 of 28 GPUs
    assert trials_at_once([need], [Nodes({"CPU": 3, "GPU": 3}, 1)], None) == 1


def test_each_place_suffices_for_any_of_the_trials() -> None:
    small, large = Need(1, 1, 1), Need(4, 1, 1)
    assert trials_at_once([small], [BOX], None) == 8
    assert trials_at_once([small, large], [BOX], None) == trials_at_once([large], [BOX], None) == 2
    # Eight workers of one CPU, or one of eight: both fit, and no trial needs eight of eight.
    assert trials_at_once([Need(8, 1, 0), Need(1, 8, 0)], [Nodes({"CPU": 8}, 1)], None) == 1


@pytest.mark.parametrize(
    ("need", "nodes", "says", "way"),
    [
        (Need(1, 1, 1), [Nodes({"CPU": 8}, 4)], "needs 1 CPU and 1 GPU, .* 8 CPUs", "train.device=cpu"),
        (
            Need(2, 16, 1),
            [Nodes({"CPU": 64}, 1, "big"), Nodes({"CPU": 8, "GPU": 8}, 9, "a3", 9)],
            "a worker needs 16 CPUs and 1 GPU, .* 'a3' with 8 CPUs, 8 GPUs",
            "train.cpus_per_worker=8 or less",
        ),
        (Need(16, 1, 1), [BOX], "train.workers = 16 .* room for 8, .*'box'", "at most train.workers=8"),
        (Need(9, 1, 1, sizes=(9, 18)), [BOX], "train.workers = 9 .* room for 8", "at most train.workers=8"),
        (Need(9, 1, 1), [Nodes({"CPU": 8, "GPU": 2}, 9, "g", 4)], "room for 8, ", "max_workers"),
        (Need(4, 2, 0, reading=1), [Nodes({"CPU": 8}, 1)], "1 CPU beside them to read data", "fewer train.workers"),
        (Need(1, 1, 0), [Nodes({"CPU": 1}, 1, spare_cpus=1)], "needs 1 CPU, ", "larger nodes"),
        (Need(1, 1, 0), [], "no nodes", "start some"),
    ],
)
def test_what_can_never_run_is_refused(need: Need, nodes: list[Nodes], says: str, way: str) -> None:
    with pytest.raises(ResourceError, match=says) as refused:
        trials_at_once([Need(1, 0.1, 0), need] if nodes and nodes[0] is BOX else [need], nodes, 1)
    assert any(way in one for one in refused.value.ways_out)


def most_of_all_ways(need: Need, nodes: Sequence[Nodes]) -> int:
    """Trials at once by trying every choice of nodes, and every spread of reading over them."""
    fixed = [kind for kind in nodes if kind.together is None for _ in range(kind.count)]
    possible = [kind for kind in nodes if kind.together is not None for _ in range(kind.count)]
    more = min([len(possible), *(kind.together for kind in nodes if kind.together is not None)])
    best = 0
    for added in itertools.combinations(possible, more):
        workers = {0: 0}  # reading placed so far: the most workers beside it
        for kind in [*fixed, *added]:
            after: dict[int, int] = {}
            for before, placed in workers.items():
                for reading, fit in ways_on(kind, need):
                    after[before + reading] = max(after.get(before + reading, -1), placed + fit)
            workers = after
        for reading, placed in workers.items():
            trials = placed // need.workers
            best = max(best, min(trials, reading) if need.reading else trials)
    return best


def ways_on(kind: Nodes, need: Need) -> Iterator[tuple[int, int]]:
    cpus, gpus = kind.resources.get("CPU", 0), kind.resources.get("GPU", 0)
    for reading in range(int(cpus / need.reading) + 1 if need.reading else 1):
        left = cpus - max(kind.spare_cpus, reading * need.reading)
        if left >= 0:
            yield reading, int(min(left / need.cpus, gpus / need.gpus if need.gpus else left / need.cpus))


@st.composite
def clusters(draw: st.DrawFn) -> list[Nodes]:
    together = draw(st.integers(1, 4))
    return [
        Nodes(
            {"CPU": draw(st.integers(1, 6)), "GPU": draw(st.integers(0, 3))},
            draw(st.integers(1, 2)),
            together=draw(st.sampled_from([None, together])),
            spare_cpus=draw(st.sampled_from([0, 0, 1])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


needs = st.builds(
    Need,
    st.integers(1, 4),
    st.sampled_from([0.5, 1, 1.5, 2]),  # exact in floating point, so that the search above is
    st.integers(0, 1),
    reading=st.sampled_from([0, 1]),
)


def found(needs: Sequence[Need], nodes: Sequence[Nodes]) -> int:
    try:
        return trials_at_once(needs, nodes, None)
    except ResourceError:
        return 0


@given(needs, clusters())
@settings(deadline=None, max_examples=400)
def test_never_more_than_fit_and_one_wherever_one_fits(need: Need, nodes: list[Nodes]) -> None:
    possible, trials = most_of_all_ways(need, nodes), found([need], nodes)
    assert trials <= possible
    assert bool(trials) == bool(possible)
    if not need.reading:
        assert trials == possible


@given(st.lists(needs, min_size=2, max_size=3), clusters())
@settings(deadline=None, max_examples=200)
def test_with_several_needs_no_more_than_of_any_alone(several: list[Need], nodes: list[Nodes]) -> None:
    alone = [most_of_all_ways(need, nodes) for need in several]
    trials = found(several, nodes)
    assert trials <= min(alone)
    assert bool(trials) == all(alone)


# ---------------------------------------------------------------------------------------------------- what there is


CONFIG: dict[str, Any] = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0, "node_config": {}},
        "cpus": {"resources": {"CPU": 16, "memory": 1 << 30}, "max_workers": 3, "node_config": {}},
        "gpus": {"resources": {"CPU": 32, "GPU": 8}, "node_config": {}},  # no limit but that of all
        "unknown": {"resources": {}, "max_workers": 3, "node_config": {}},
    },
}
HEAD = {"node:__internal_head__": 1.0, "CPU": 4.0, "memory": 8e9}
HEAD_OFFERS_NOTHING = {"node:__internal_head__": 1.0, "memory": 8e9}


def node(resources: dict[str, float], kind: str = "", alive: bool = True, address: str = "10.77.0.1") -> dict[str, Any]:
    return {
        "NodeID": str(resources), "Alive": alive, "Resources": resources, "NodeManagerAddress": address,
        "Labels": {"ray.io/node-group": kind} if kind else {},
    }  # fmt: skip


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives Ray's answers: nodes, the autoscaler's configuration and why it is not there, and Ray's own table."""
    import ray
    import ray._private.state

    monkeypatch.setenv("RAY_ADDRESS", "auto")

    def answers(nodes: list[dict[str, Any]], config: Any = None, why: str = "", table: Any = None) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: table)
        monkeypatch.setattr(module, "_config", lambda alive: (config, why))

    return answers


def test_nodes_that_are_there_are_not_counted_again_among_those_to_come(connected: Callable[..., None]) -> None:
    there = [node(HEAD, "head"), node({"CPU": 16.0}, "cpus"), node({"CPU": 64.0}), node({"CPU": 9.0}, alive=False)]
    connected([*there, node({"CPU": 32.0, "GPU": 8.0})], CONFIG)  # the last one does not say its type
    assert cluster() == [
        Nodes({"CPU": 4}, 1, "head"),
        Nodes({"CPU": 64}, 1),
        Nodes({"CPU": 16}, 3, "cpus", 5),
        Nodes({"CPU": 32, "GPU": 8}, 5, "gpus", 5),
    ]


def test_without_an_autoscaler_what_is_there_counts(connected: Callable[..., None]) -> None:
    connected([node(HEAD), node({"CPU": 8.0, "GPU": 1.0})])
    assert cluster() == [Nodes({"CPU": 4}, 1), Nodes({"CPU": 8, "GPU": 1}, 1)]


def test_ray_of_ones_own_has_a_cpu_that_the_machine_has_not(
    connected: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    connected([node(HEAD)])  # workers have no RAY_ADDRESS, also where Ray is not of one's own
    assert cluster() == [Nodes({"CPU": 4}, 1)]
    connected([node(HEAD, address="127.0.0.1")])
    assert cluster() == [Nodes({"CPU": 4}, 1, spare_cpus=1)]
    assert trials_at_once([Need(1, 1, 0)], cluster(), None) == 3


def test_limits_that_cannot_be_read_are_said(connected: Callable[..., None]) -> None:
    connected([node(HEAD)], None, "403 Client Error")
    lines: list[str] = []
    assert cluster(lines.append) == [Nodes({"CPU": 4}, 1)]
    assert len(lines) == 1 and "403 Client Error" in lines[0]


def test_rays_own_table_goes_before_files(connected: Callable[..., None]) -> None:
    from ray.core.generated import autoscaler_pb2 as proto

    groups = [
        proto.NodeGroupConfig(name="g", resources={"CPU": 8, "GPU": 1}, max_count=7),
        proto.NodeGroupConfig(name="u", resources={"CPU": 96}, max_count=-1),
        proto.NodeGroupConfig(name="none", resources={"CPU": 96}, max_count=0),
    ]
    table = proto.ClusterConfig(node_group_configs=groups)
    growing = [Nodes({"CPU": 8, "GPU": 1}, 7, "g"), Nodes({"CPU": 96}, module.UNLIMITED, "u")]
    connected([node(HEAD)], CONFIG, table=table)
    assert cluster()[1:] == growing
    connected([node(HEAD), node({"CPU": 96.0}, "none")], CONFIG, table=table)  # its limit was lowered meanwhile
    assert cluster()[1:] == [*growing, Nodes({"CPU": 96}, 1, "none")]


def test_the_file_of_this_clusters_autoscaler_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    file = tmp_path / "bootstrap.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    options = [f"--logs-dir={tmp_path}/session_of_mine/logs", f"--autoscaling-config={file}"]
    monitor = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)", *options],
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert monitor.stdout is not None and monitor.stdout.readline()
        assert module.on_head("session_of_mine") == (CONFIG, "")
        assert module.on_head("session_of_another") == (None, "")
        file.unlink()
        config, why = module.on_head("session_of_mine")
        assert config is None and str(file) in why
    finally:
        monitor.kill()
        monitor.communicate()


def ray_cluster(grows: bool) -> dict[str, Any]:
    def group(**limits: str) -> dict[str, Any]:
        return {
            "rayStartParams": {},
            "template": {"spec": {"containers": [{"resources": {"limits": {"memory": "8Gi", **limits}}}]}},
        }

    return {
        "metadata": {"name": "mine", "namespace": "ml"},
        "spec": {
            "enableInTreeAutoscaling": grows,
            "headGroupSpec": group(cpu="4"),
            "workerGroupSpecs": [
                {**group(**{"cpu": "32", "nvidia.com/gpu": "8"}), "groupName": "a3", "minReplicas": 0, "maxReplicas": 3}
            ],
        },
    }


def test_kuberays_limits_are_read_from_its_raycluster(
    connected: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what KubeRay keeps, and Kubernetes' answers made up: no real one has been asked."""
    import requests
    from ray.autoscaler._private.kuberay import node_provider

    asked: list[str] = []
    kept = [ray_cluster(True), ray_cluster(False), None]

    def kubernetes(url: str, headers: dict[str, str], **options: Any) -> requests.Response:
        asked.append(url)
        found, answer = kept.pop(0), requests.Response()
        answer.status_code, answer._content = 403 if found is None else 200, json.dumps(found).encode()
        return answer

    (tmp_path / "namespace").write_text("ml")
    monkeypatch.setattr(module, "NAMESPACE", str(tmp_path / "namespace"))
    monkeypatch.setenv("RAY_CLUSTER_NAME", "mine")
    monkeypatch.setattr(node_provider, "load_k8s_secrets", lambda: ({}, "ca.crt", None))
    monkeypatch.setattr(requests, "get", kubernetes)
    config, why = module.on_head("session_of_kuberay")
    assert why == "" and config is not None
    assert asked[0].endswith("/apis/ray.io/v1/namespaces/ml/rayclusters/mine")
    connected([node(HEAD, "headgroup")], config)
    assert cluster() == [Nodes({"CPU": 4}, 1, "headgroup"), Nodes({"CPU": 32, "GPU": 8}, 3, "a3", 3)]
    assert module.on_head("session_of_kuberay") == ({}, "")  # a cluster that does not grow
    config, why = module.on_head("session_of_kuberay")
    assert config is None and "403" in why
