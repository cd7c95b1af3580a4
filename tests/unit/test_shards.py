"""Spans in files: whatever cut they were written in, any other cut reads the same, and nothing missing goes unseen."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_ft.errors import CheckpointError
from ray_ft.span import Span
from ray_ft.train import shards

SHAPES: dict[str, tuple[int, ...]] = {
    "model/matrix": (7, 5),
    "model/vector": (11,),
    "optim/matrix/step": (),
    "model/cube": (3, 2, 4),
}


def values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def cut(tensor: torch.Tensor, pieces: int, rng: random.Random) -> list[Span]:
    """A tensor in `pieces` runs with ends anywhere; some may be empty."""
    ends = [0, *sorted(rng.randint(0, tensor.numel()) for _ in range(pieces - 1)), tensor.numel()]
    flat = tensor.reshape(-1)
    return [Span(flat[a:b].clone(), a, tuple(tensor.shape)) for a, b in itertools.pairwise(ends)]


def write(folder: Path, tensors: dict[str, torch.Tensor], workers: int, seed: int) -> None:
    rng = random.Random(seed)
    cuts = {name: cut(tensor, workers, rng) for name, tensor in tensors.items()}
    written = [
        shards.write(str(folder), rank, {name: spans[rank] for name, spans in cuts.items()}) for rank in range(workers)
    ]
    shards.write_index(str(folder), written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (4, 2), (3, 1), (5, 5)])
def test_any_cut_reads_what_any_other_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int, readers: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 16)  # bytes: every tensor takes several blocks
    tensors = values(dtype)
    write(tmp_path, tensors, writers, seed=writers)
    index = shards.read_index(str(tmp_path))
    assert {name: stored.shape for name, stored in index.items()} == SHAPES
    assert {stored.dtype for stored in index.values()} == {dtype}
    rng = random.Random(99)
    cuts = {name: cut(torch.full_like(tensor, float("nan")), readers, rng) for name, tensor in tensors.items()}
    for reader in range(readers):
        shards.read(str(tmp_path), index, {name: spans[reader] for name, spans in cuts.items()})
    for name, tensor in tensors.items():
        joined = torch.cat([span.data for span in cuts[name]]).view(tensor.shape)
        assert torch.equal(joined, tensor), name


def test_values_are_converted_to_the_element_type_of_who_reads(tmp_path: Path) -> None:
    tensors = values(torch.float32)
    write(tmp_path, tensors, 2, seed=1)
    span = Span.whole(torch.zeros(SHAPES["model/cube"], dtype=torch.bfloat16))
    shards.read(str(tmp_path), shards.read_index(str(tmp_path)), {"model/cube": span})
    assert torch.equal(span.data, tensors["model/cube"].to(torch.bfloat16).view(-1))


def test_of_copies_only_the_owners_is_written(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    written = [
        shards.write(str(tmp_path), 0, {"model/a": Span.whole(tensor)}),
        shards.write(str(tmp_path), 1, {"model/a": Span.whole(tensor, owner=False)}),
    ]
    shards.write_index(str(tmp_path), written)
    assert shards.read_index(str(tmp_path))["model/a"].runs == (("shard_00000.safetensors", 0, 6),)


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([(0, 3), (4, 6)], "a gap"),
        ([(0, 4), (3, 6)], "twice"),
        ([(0, 5)], "the end is missing"),
        ([(1, 6)], "the start"),
    ],
)
def test_pieces_that_do_not_make_up_the_whole_are_refused(
    tmp_path: Path, runs: list[tuple[int, int]], why: str
) -> None:
    whole = torch.arange(6.0)
    written = [
        shards.write(str(tmp_path), rank, {"model/a": Span(whole[a:b], a, (6,))}) for rank, (a, b) in enumerate(runs)
    ]
    with pytest.raises(CheckpointError, match=r"model/a do not make up its 6 elements"):
        shards.write_index(str(tmp_path), written)


def test_a_filesystem_whose_folders_have_to_be_made(tmp_path: Path) -> None:
    folder = f"file://{tmp_path}/not/yet/there"
    tensor = torch.arange(6.0)
    shards.write_index(folder, [shards.write(folder, 0, {"model/a": Span.whole(tensor)})])
    found = Span.whole(torch.zeros(6))
    shards.read(folder, shards.read_index(folder), {"model/a": found})
    assert torch.equal(found.data, tensor)


def test_the_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    tensors = values(torch.bfloat16)
    write(tmp_path, tensors, 1, seed=0)
    found = load_file(tmp_path / "shard_00000.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(SHAPES, torch.bfloat16)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(SHAPES[name]), tensor)
