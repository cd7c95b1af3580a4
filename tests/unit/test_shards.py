"""Spans in files: whatever cut they were written in, any other cut reads the same, and nothing missing goes unseen."""

from __future__ import annotations

import itertools
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_ft import paths
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
    write_index(str(folder), written)


def write_index(folder: str, written: list[shards.Written]) -> None:
    paths.write_bytes(paths.join(folder, shards.INDEX), shards.index_of(written))


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
    write_index(str(tmp_path), written)
    [run] = shards.read_index(str(tmp_path))["model/a"].runs
    assert (run.file, run.start, run.stop) == ("shard_00000.safetensors", 0, 6)


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
        write_index(str(tmp_path), written)


def test_a_filesystem_whose_folders_have_to_be_made(tmp_path: Path) -> None:
    folder = f"file://{tmp_path}/not/yet/there"
    tensor = torch.arange(6.0)
    write_index(folder, [shards.write(folder, 0, {"model/a": Span.whole(tensor)})])
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


def test_elements_of_several_widths_lie_aligned_and_come_back(tmp_path: Path) -> None:
    tensors = {
        "model/a": torch.randn(3).to(torch.bfloat16),  # 6 bytes: what follows would begin between two elements
        "model/b": torch.randn(5),
        "optim/c": torch.arange(7, dtype=torch.uint8),
        "optim/d": torch.arange(2),
    }
    write(tmp_path, tensors, 1, seed=0)
    found = {name: Span.whole(torch.zeros_like(tensor)) for name, tensor in tensors.items()}
    shards.read(str(tmp_path), shards.read_index(str(tmp_path)), found)
    loaded = load_file(tmp_path / "shard_00000.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name].data, tensor) and torch.equal(loaded[name], tensor)


# --------------------------------------------------------------------------------------------------- damaged bytes

FILE = "shard_00000.safetensors"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tensors of 40 bytes in blocks of 16, and the index."""
    monkeypatch.setattr(shards, "BLOCK", 16)
    write(tmp_path, {"model/a": torch.arange(10.0), "model/b": torch.arange(10.0)}, 1, seed=0)
    return tmp_path


def spans_of(**cuts: tuple[int, int]) -> dict[str, Span]:
    return {f"model/{name}": Span(torch.zeros(b - a), a, (10,)) for name, (a, b) in cuts.items()}


def test_a_flipped_bit_anywhere_in_a_file_is_noticed_by_whoever_needs_that_byte(blocks: Path) -> None:
    size = (blocks / FILE).stat().st_size
    header = size - 80
    index = shards.read_index(str(blocks))
    for at in range(size):
        flip(blocks / FILE, at)
        with pytest.raises(shards.Damaged) as caught:
            shards.read(str(blocks), index, spans_of(a=(0, 10), b=(0, 10)))
        error = caught.value
        value = (at - header) // 4
        tensor = None if at < header else "model/a" if value < 10 else "model/b"
        block = 0 if tensor is None else header + value // 10 * 40 + value % 10 // 4 * 16
        assert (error.file, error.tensor, error.offset) == (FILE, tensor, block)
        assert f"{blocks}/{FILE} has other bytes than were written" in error.what and f"byte {block}" in error.what
        flip(blocks / FILE, at)
    shards.read(str(blocks), index, spans_of(a=(0, 10), b=(0, 10)))


def test_of_a_block_the_whole_is_checked_whatever_part_of_it_is_wanted(blocks: Path) -> None:
    flip(blocks / FILE, (blocks / FILE).stat().st_size - 80 + 3)  # of element 0 of `a`
    index = shards.read_index(str(blocks))
    with pytest.raises(shards.Damaged):
        shards.read(str(blocks), index, spans_of(a=(3, 4)))
    spans = spans_of(a=(4, 9), b=(1, 2))  # other blocks are good
    shards.read(str(blocks), index, spans)
    assert spans["model/a"].data.tolist() == [4, 5, 6, 7, 8]
    assert spans["model/b"].data.tolist() == [1]


@pytest.mark.parametrize(("cut", "said"), [(1, "ends at byte"), (79, "ends at byte"), (81, "ends at byte")])
def test_a_file_that_is_cut_off_is_named_with_where_it_ends(blocks: Path, cut: int, said: str) -> None:
    size = (blocks / FILE).stat().st_size
    os.truncate(blocks / FILE, size - cut)
    with pytest.raises(shards.Damaged, match=said) as caught:
        shards.read(str(blocks), shards.read_index(str(blocks)), spans_of(a=(0, 10), b=(0, 10)))
    assert str(size - cut) in caught.value.what


def test_a_file_that_is_gone_is_damage_not_trouble_with_storage(blocks: Path) -> None:
    (blocks / FILE).unlink()
    with pytest.raises(shards.Damaged, match=f"{FILE} is missing"):
        shards.read(str(blocks), shards.read_index(str(blocks)), spans_of(a=(0, 1)))


def test_a_bit_that_tips_on_the_way_once_is_no_damage(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers = shards.checksum, iter([0])
    monkeypatch.setattr(shards, "checksum", lambda content: next(answers, real(content)))
    spans = spans_of(a=(0, 10))
    shards.read(str(blocks), shards.read_index(str(blocks)), spans)
    assert spans["model/a"].data.tolist() == list(range(10))


def test_damage_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(shards.Damaged("what", ["way"], FILE, "model/a", 16)))
    assert (error.what, error.ways_out) == ("what", ("way",))
    assert (error.file, error.tensor, error.offset) == (FILE, "model/a", 16)


def test_who_no_longer_wants_a_file_stops_its_writing(blocks: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(shards.Stopped):
        shards.write(str(blocks / "new"), 0, spans_of(a=(0, 10)), lambda: next(asked))
    assert (blocks / "new" / FILE).stat().st_size < (blocks / FILE).stat().st_size
