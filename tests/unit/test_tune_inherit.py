"""Going on from another trial's checkpoint: bit-equal before the first step, whenever the copy is cut short."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of
from rich.console import Console

from ray_ft import paths, retry
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError, StorageError
from ray_ft.recipe import Recipe
from ray_ft.train import checkpoint, launch, worker
from ray_ft.train.metrics import read_metrics
from ray_ft.tune import inherit
from ray_ft.view import View

QUIET = View(Console(quiet=True))
TRAINING = ["train.max_steps=6", "train.checkpoint.every=2", "train.checkpoint.keep=9", "train.log_every=1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def two(demo: DemoPaths, storage: Path) -> tuple[Recipe, Recipe]:
    """Recipes that differ in their learning rate."""
    here = ["train.workers=0", "train.strategy=none"]
    return (
        recipe_of(demo, storage, *TRAINING, *here, "run.name=s/0000", "train.optimizer.lr=3e-3"),
        recipe_of(demo, storage, *TRAINING, *here, "run.name=s/0001", "train.optimizer.lr=1e-5"),
    )


@pytest.fixture(scope="module")
def trained(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    for one in two(demo, storage):
        launch.train(one, QUIET)
    return storage


@pytest.fixture
def pair(demo: DemoPaths, trained: Path, tmp_path: Path) -> tuple[Recipe, Recipe]:
    """Two trained runs of a test's own."""
    return two(demo, Path(shutil.copytree(trained, tmp_path / "runs")))


def at(one: Recipe, step: int) -> str:
    return next(where for found, where in checkpoint.committed(one.run.dir.checkpoints) if found == step)


def take_over(child: Recipe, location: str) -> checkpoint.Found:
    inherit.intend(child.run.dir, {"checkpoint": location})
    return inherit.inherit(child.run.dir, location)


def loss(one: Recipe, step: int) -> float:
    return next(row["loss"] for row in read_metrics(one.run.dir) if row["step"] == step)


def test_weights_and_moments_are_the_parents_to_the_bit_before_the_first_step(
    pair: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = pair
    own = loss(child, 5)
    found = take_over(child, at(parent, 4))
    assert found.step == 4
    assert [step for step, _ in checkpoint.folders(child.run.dir.checkpoints)] == [4]
    seen: dict[str, torch.Tensor] = {}
    restored = worker.restore

    def looking(found: Any, strategy: Any, link: Any) -> None:
        restored(found, strategy, link)
        spans = worker.state(strategy)
        seen.update(copy_of(spans))
        stored = zeros_like(spans)
        checkpoint.restore(at(parent, 4), stored)
        expected = copy_of(stored)
        assert seen.keys() == expected.keys()
        assert any(name.startswith("optim/") for name in seen)
        for name, value in expected.items():
            assert torch.equal(value, seen[name]), name

    monkeypatch.setattr(worker, "restore", looking)
    launch.train(child, QUIET)
    assert seen
    assert loss(child, 5) == loss(parent, 5) != own  # of the parent's weights, on the same rows
    assert loss(child, 6) != loss(parent, 6)  # the step between was taken with the child's learning rate


def copy_of(spans: Any) -> dict[str, torch.Tensor]:
    return {name: span.data.detach().clone() for name, span in spans.items()}


def zeros_like(spans: Any) -> Any:
    import dataclasses

    return {name: dataclasses.replace(span, data=torch.zeros_like(span.data)) for name, span in spans.items()}


def test_a_copy_that_was_cut_short_is_made_again(pair: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pair
    link = inherit._link
    linked: list[str] = []

    def failing(one: str, other: str) -> None:
        if len(linked) == 2:
            raise PermissionError("no more")
        linked.append(other)
        link(one, other)

    monkeypatch.setattr(inherit, "_link", failing)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    with pytest.raises(OSError, match="no more"):
        take_over(child, at(parent, 4))
    monkeypatch.setattr(inherit, "_link", link)
    taken = inherit.pending(child.run.dir)
    assert taken == {"checkpoint": at(parent, 4)}
    assert 6 in checkpoint.steps(child.run.dir.checkpoints)  # its own are there as long as the other is not
    assert inherit.inherit(child.run.dir, taken["checkpoint"]).step == 4
    assert inherit.pending(child.run.dir) is None
    assert [step for step, _ in checkpoint.folders(child.run.dir.checkpoints)] == [4]


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_parent_that_is_not_whole_costs_the_child_nothing(pair: tuple[Recipe, Recipe], harm: str) -> None:
    parent, child = pair
    location = at(parent, 4)
    if harm == "gone":
        shutil.rmtree(location)
    else:
        shard = next(Path(location).glob("*.safetensors"), None) or next(
            file for file in Path(location).iterdir() if file.name not in (checkpoint.COMMITTED, checkpoint.STATE)
        )
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises((CheckpointError, StorageError)):
        take_over(child, location)
    assert checkpoint.newest(child.run.dir.checkpoints).step == 6  # type: ignore[union-attr]


def test_copies_are_links_where_the_filesystem_has_them_and_whole_files_elsewhere(
    pair: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = pair
    found = take_over(child, at(parent, 2))
    for file in Path(found.location).iterdir():
        assert file.stat().st_ino == Path(at(parent, 2), file.name).stat().st_ino
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("not here")))
    found = take_over(child, at(parent, 4))
    for file in Path(found.location).iterdir():
        assert file.stat().st_ino != Path(at(parent, 4), file.name).stat().st_ino
        assert file.read_bytes() == Path(at(parent, 4), file.name).read_bytes()
    checkpoint.delete(at(parent, 4), lambda line: pytest.fail(line))
    assert checkpoint.verify(found.location)
    assert not paths.exists(child.run.dir.at(inherit.INTENTION))
