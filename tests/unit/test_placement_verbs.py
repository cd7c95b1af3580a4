"""What each verb asks of a cluster: only what it needs, and nothing of the head that it is driven from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_ft import answers, placement
from ray_ft.answers import Target
from ray_ft.data import stream
from ray_ft.demo import DemoPaths
from ray_ft.errors import ResourceError
from ray_ft.export import vllm_process
from ray_ft.placement import feasible
from ray_ft.placement.capacity import Nodes
from ray_ft.recipe import Recipe
from ray_ft.train import cluster, launch
from ray_ft.trained import Trained
from ray_ft.view import View

HEAD = Nodes({}, 1, "head")
CPUS = Nodes({"CPU": 16}, 4, "cpus", together=6)
GPUS = Nodes({"CPU": 96, "GPU": 8}, 2, "h100", together=6)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A cluster of these nodes, of which none is up but the head; this process is connected to it."""

    @contextlib.contextmanager
    def connected(*_: Any) -> Iterator[None]:
        yield

    def made(*nodes: Nodes) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "10.77.0.1:6379")
        monkeypatch.setattr(answers.session, "connected", connected)
        monkeypatch.setattr(feasible.session, "gpus", lambda: 0)
        monkeypatch.setattr(feasible, "cluster", lambda say=None: list(nodes))
        monkeypatch.setattr(cluster.capacity, "cluster", lambda say=None: list(nodes))

    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(device, actors) of each engine that was made."""
    from ray_ft.answers import local

    found: list[tuple[str, int]] = []

    def start(what: Any, device: str, actors: int) -> list[Any]:
        found.append((device, actors))
        return []

    monkeypatch.setattr(local, "_start", start)
    return found


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([HEAD, CPUS, GPUS], {}, ("cuda", 8)),  # those of one node, though none is up
        ([HEAD, CPUS, GPUS], {"gpus": 1}, ("cuda", 1)),
        ([HEAD, CPUS, GPUS], {"device": "cpu"}, ("cpu", 1)),
        ([HEAD, CPUS], {}, ("cpu", 1)),
    ],
)
def test_a_cluster_answers_in_actors_and_not_in_the_driver(
    joined: Callable[..., None],
    started: list[tuple[str, int]],
    demo: DemoPaths,
    nodes: list[Nodes],
    options: dict[str, Any],
    expected: tuple[str, int],
) -> None:
    joined(*nodes)
    with answers.opened(Target.of(demo.base), "transformers", **options) as engine:
        assert engine._here is None  # type: ignore[attr-defined]
    assert started == [expected]


def test_a_gpu_that_no_node_has_or_may_get_is_refused(joined: Callable[..., None], demo: DemoPaths) -> None:
    joined(HEAD, CPUS)
    with pytest.raises(ResourceError, match="no GPU"), answers.opened(Target.of(demo.base), device="cuda"):
        pass


def test_an_actor_that_answers_asks_for_half_a_node_at_most(joined: Callable[..., None]) -> None:
    for cpus, expected in ((1, 1), (3, 1), (4, 2), (96, 4)):
        joined(HEAD, Nodes({"CPU": cpus}, 1))
        assert placement.answering_cpus() == expected
    joined(HEAD)
    with pytest.raises(ResourceError, match="no node has CPUs"):
        placement.answering_cpus()


def test_training_counts_gpus_that_are_still_to_come(
    joined: Callable[..., None], make_recipe: Callable[..., Recipe]
) -> None:
    joined(HEAD, CPUS, GPUS)
    assert cluster.on_gpus(make_recipe("train.workers=1"))
    assert not cluster.on_gpus(make_recipe("train.workers=1", "train.device=cpu"))
    joined(HEAD, CPUS)
    assert not cluster.on_gpus(make_recipe("train.workers=1"))


def test_an_impossible_run_is_refused_before_its_data_is_prepared(
    joined: Callable[..., None], make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(HEAD, CPUS, GPUS)
    monkeypatch.setattr(launch, "prepare_job", lambda *_: pytest.fail("it prepared the data"))
    recipe = make_recipe("train.workers=32", "train.device=cuda", "train.global_batch=128")
    with pytest.raises(ResourceError, match="room for 16"):
        launch.train(recipe, View(Console(quiet=True)))
    assert not (tmp_path / "runs").exists()


def test_reading_is_limited_where_an_autoscaler_would_start_nodes_for_it() -> None:
    limited = stream.in_order(64)
    assert limited.preserve_order and limited.resource_limits.cpu == 64 and limited.resource_limits.gpu == 0
    free = stream.in_order(None)
    assert free.preserve_order and free.resource_limits.cpu == float("inf")


@pytest.mark.parametrize(("version", "builds"), [("0.32.0", True), ("0.32.0+cpu", False), (None, False)])
def test_a_gpu_build_of_vllm_is_not_asked_on_a_head_without_gpus(
    version: str | None, builds: bool, monkeypatch: pytest.MonkeyPatch, make_recipe: Callable[..., Recipe]
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    assert vllm_process._built_for_gpus() is builds


def test_an_export_on_such_a_head_leaves_vllm_out_and_says_why(
    monkeypatch: pytest.MonkeyPatch, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe("train.max_steps=1")
    launch.train(recipe, View(Console(quiet=True)))
    trained = Trained.of(recipe.run.dir.root)
    monkeypatch.setattr(vllm_process.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(vllm_process.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_process, "_built_for_gpus", lambda: True)
    assert "built for GPUs" in (vllm_process.obstacle(trained) or "")


def test_ray_data_looks_at_the_cluster_again_before_a_second_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its setting is there, and is what decides: else all work begins with one task and a second of waiting."""
    from ray.data import ExecutionOptions, ExecutionResources
    from ray.data._internal.execution.resource_manager import ResourceManager

    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 1)
    manager = ResourceManager.__new__(ResourceManager)
    manager._options, manager._object_store_memory_limit_fraction = ExecutionOptions(), 0.5
    manager._global_limits, now = ExecutionResources.zero(), 1000.0
    manager._global_limits_last_update_time = now
    manager._get_total_resources = lambda: ExecutionResources(cpu=4)
    assert 2 * stream.LIMITS_SECONDS < 1
    monkeypatch.setattr(time, "time", lambda: now + 2 * stream.LIMITS_SECONDS)
    assert manager.get_global_limits().cpu == 0
    stream.know_limits_soon()
    assert manager.get_global_limits().cpu == 4
