"""The benchmark of checkpoints: what its figures are computed from, and that all ways save the same and restore it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint
from benchmarks.in_process import Stretch, Training
from benchmarks.peers import torch_checkpoints as peers
from ray_ft.train import shards


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with peers.alone(), contextlib.closing(Training(str(tmp_path_factory.mktemp("bench")), width=64, layers=1)) as one:
        yield one
    torch.set_num_threads(threads)


def filled(training: Training, value: float) -> None:
    with torch.no_grad():
        for tensor in training.tensors().values():
            tensor.fill_(value)


def all_are(training: Training, value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in training.tensors().values())


PEERS = {
    "torch": (peers.torch_save, peers.torch_load),
    "mapped": (peers.torch_save, peers.torch_load_mapped),
    "dcp": (peers.dcp_save, peers.dcp_load),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_saves_all_that_ours_does_and_gives_it_back(training: Training, name: str, tmp_path: Path) -> None:
    save, load = PEERS[name]
    filled(training, 3)
    save(training.tensors(), str(tmp_path / "peer"))
    assert checkpoint.size_of(str(tmp_path)) >= training.bytes
    filled(training, 4)
    load(training.tensors(), str(tmp_path / "peer"))
    assert all_are(training, 3)


def test_an_asynchronous_peer_saves_what_was_there_when_it_was_called(training: Training, tmp_path: Path) -> None:
    with contextlib.closing(peers.Async()) as asynchronous:
        for value in (5, 6):  # again, into the copy that is kept
            filled(training, value)
            wait = asynchronous.save(training.tensors(), str(tmp_path / str(value)))
            filled(training, 9)
            wait()
            peers.dcp_load(training.tensors(), str(tmp_path / str(value)))
            assert all_are(training, value)


def test_ours_saves_the_state_of_its_step_beside_the_next_one(training: Training) -> None:
    training.step()
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}
    assert training.bytes == sum(tensor.nbytes for tensor in before.values())
    training.save()
    assert training.pending and training.step() > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in training.tensors().items())
    training.settle()
    training.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in training.tensors().items())


def test_a_stretch_counts_the_saves_in_it_and_the_time_of_their_writing(training: Training) -> None:
    quiet, saved = training.stretch(4, False), training.stretch(4, True)
    assert len(quiet.steps) == len(saved.steps) == 4
    assert (quiet.saves, quiet.writing) == (0, 0) and saved.saves >= 1
    assert 0 < saved.writing <= saved.seconds


def test_what_is_measured_of_writing_is_taken_back(training: Training, tmp_path: Path) -> None:
    write = shards.write
    Training(str(tmp_path), width=64, layers=1).close()
    assert shards.write is write


def test_slowness_is_what_steps_took_longer_over_the_time_of_writing() -> None:
    quiet = Stretch([1.0, 1.0, 5.0], 7.0, 0, 0.0)  # one that something else disturbed
    saved = Stretch([1.0, 1.1, 1.1, 1.0], 4.6, 2, 4.0)
    found = checkpoint.slowness(quiet, saved)
    assert found == pytest.approx({"step": 1.0, "slower": 1.05, "cost": 0.3, "writing": 2.0})


@pytest.mark.parametrize("mib", [64, 256, 512, 1024])
def test_a_state_is_about_as_large_as_asked(mib: int) -> None:
    width, layers = checkpoint.shape(mib).values()
    parameters = layers * (3 * 4 * width**2 + 384 * width) + 640 * width
    assert 0.85 < parameters * 12 / 2**20 / mib < 1.15


def pair(**seconds: float) -> dict[str, Any]:
    found = {name: {"blocked": value, "restore": 2 * value, "bytes": 100 * value} for name, value in seconds.items()}
    found["torch"]["mapped"] = 1.0
    return found


def test_figures_are_ratios_of_the_same_pair() -> None:
    pairs = [
        pair(copy=0.2, **{"ray-ft": 0.1}, torch=1.0, dcp=2.0, **{"async": 0.4}),
        pair(copy=0.1, **{"ray-ft": 0.2}, torch=1.0, dcp=4.0, **{"async": 0.4}),
    ]
    steps = [{"step": 1.0, "slower": 1.02, "cost": 0.1, "writing": 1.0}]
    found = checkpoint.figures({"bytes": 2**30, "first": 0.5, "pairs": pairs}, {1: steps, 2: steps})
    values = {figure.name: list(figure.values) for figure in found}
    assert values["seconds blocked by a save, ray-ft ÷ a copy in memory"] == [0.5, 2.0]
    assert values["blocked, ray-ft ÷ DCP async_save"] == [0.25, 0.5]
    assert values["restore, ray-ft ÷ DCP load"] == [0.05, 0.05]
    assert values["restore, ray-ft ÷ torch.load(mmap=True)"] == [0.2, 0.4]
    assert values["a copy in memory"] == [5.0, 10.0]
    aims = {figure.name: figure.reached for figure in found if figure.reached is not None}
    assert list(aims.values()) == [False, True]  # 1.25 of the copy; 1.02
    [row] = checkpoint.growth([{"bytes": 2**30, "first": 0.5, "pairs": pairs}]).rows
    assert row[:4] == ["1,024", "0.500", "0.150", "0.150"]
