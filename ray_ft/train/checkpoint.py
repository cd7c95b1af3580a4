"""Checkpoints: sharded, on any filesystem, and none counts before its COMMITTED marker is written.

    checkpoints/step_00000100/ __0_0.distcp … .metadata (torch DCP)  state.json  COMMITTED (sizes of all files)

Tensors lie by qualified name (`model.*`, `optim.<parameter>.*`), so a checkpoint restores at another number of workers;
torch's distributed checkpoint reshards while loading. The newest valid one is used; a broken one is set aside under
another name, never deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase

from ray_ft import paths
from ray_ft.errors import CheckpointError

FORMAT = 1
COMMITTED = "COMMITTED"
PREFIX = "step_"


@dataclass(frozen=True)
class Found:
    """A committed checkpoint; `state` is its state.json."""

    location: str
    step: int
    state: dict[str, Any]


def name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def steps(folder: str) -> list[int]:
    """Steps of all committed checkpoints in a run's checkpoints folder, oldest first; none is opened."""
    return [
        int(entry.removeprefix(PREFIX))
        for entry in paths.list_dir(folder)
        if entry.removeprefix(PREFIX).isdigit() and paths.exists(paths.join(folder, entry, COMMITTED))
    ]


def newest(folder: str, on_broken: Any = None) -> Found | None:
    """The newest checkpoint whose files are all there in full, or None.

    Args:
        on_broken: called with (location, why) for each newer one that is not; without it they are only passed over,
            with it they are also renamed to `<name>.broken`, or `<name>.broken-2` and so on where there was one before.
    """
    for step in reversed(steps(folder)):
        location = paths.join(folder, name(step))
        try:
            return Found(location, step, _verify(location))
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if on_broken is not None:
                aside = _free(paths.add_suffix(location, ".broken"))
                paths.move(location, aside)
                on_broken(aside, str(error))
    return None


def _free(location: str) -> str:
    names = itertools.chain([location], (paths.add_suffix(location, f"-{number}") for number in itertools.count(2)))
    return next(candidate for candidate in names if not paths.exists(candidate))


def _verify(location: str) -> dict[str, Any]:
    listing = paths.read_json(paths.join(location, COMMITTED))
    fs, _ = paths.filesystem(location)
    for file, size in listing["files"].items():
        _, path = paths.filesystem(paths.join(location, file))
        info = fs.get_file_info(path)
        if info.size != size:
            raise CheckpointError(f"{file} has {info.size} bytes, {size} were committed")
    state = paths.read_json(paths.join(location, "state.json"))
    if state["format"] != FORMAT:
        raise CheckpointError(f"format {state['format']!r}, this version reads {FORMAT}")
    return state


def save(folder: str, step: int, tensors: dict[str, Any], state: dict[str, Any], rank: int, world: int) -> str:
    """Write a checkpoint; every rank calls it. Returns its location.

    Args:
        tensors: nested dictionaries of tensors and DTensors.
        state: what state.json holds besides the format and the step.
    """
    location = paths.join(folder, name(step))
    if rank == 0:
        paths.delete_dir(location)  # what an earlier attempt left without committing it
    _barrier(world)
    with _single_process(world):
        dcp.save(tensors, storage_writer=_writer(location), no_dist=world == 1)
    if rank == 0:
        paths.write_json(paths.join(location, "state.json"), {"format": FORMAT, "step": step, **state})
        fs, path = paths.filesystem(location)
        sizes = {info.base_name: info.size for info in fs.get_file_info(pafs.FileSelector(path))}
        paths.write_json(paths.join(location, COMMITTED), {"files": sizes})
    _barrier(world)
    return location


def restore(location: str, tensors: dict[str, Any], world: int, *, partial: bool = False) -> None:
    """Fill tensors from a checkpoint in place, whatever the number of workers that wrote it.

    Of a top-level section that is asked for ("model", "optim"), all of it has to be: a trained parameter left out would
    silently be the base's again. With `partial` the caller sees to that.

    Raises:
        CheckpointError: it lacks one of them or has one more, or one has another shape.
    """
    try:
        wanted = set(_leaves(tensors))
        stored = {name for name in read_metadata(location) if name.partition(".")[0] in tensors}
        more = set() if partial else stored - wanted
        for what, names in (("it lacks", wanted - stored), ("it also holds", more)):
            if names:
                raise ValueError(
                    f"{what} {', '.join(sorted(names)[:3])}{f' … ({len(names)})' if len(names) > 3 else ''}"
                )
        with _single_process(world):
            dcp.load(tensors, storage_reader=reader(location), no_dist=world == 1)
    except (RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        raise CheckpointError(
            f"{location} does not fit this recipe: {str(error).strip().splitlines()[-1][:300]}",
            [
                "train under another run.name",
                "or with the model, optimizer and frozen parameters that it was written with",
            ],
        ) from error


def retain(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints."""
    for step in steps(folder)[:-keep]:
        paths.delete_dir(paths.join(folder, name(step)))


@contextlib.contextmanager
def _single_process(world: int) -> Iterator[None]:
    """Silences torch's remark that a single process seems to be meant: with one worker it is."""
    with warnings.catch_warnings():
        if world == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


# ------------------------------------------------------------------------------------------------------- storage


class _ArrowFileSystem(FileSystemBase):
    """Any pyarrow filesystem as torch's distributed checkpoint wants it."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        fs, inner = paths.filesystem(str(path))
        if "r" in mode:
            with fs.open_input_file(inner) as stream:
                yield stream
        else:
            with fs.open_output_stream(inner, compression=None) as stream:
                yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return paths.join(str(path), suffix)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        paths.move(str(path), str(new_path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        fs, inner = paths.filesystem(str(path))
        fs.create_dir(inner, recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return paths.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        fs, inner = paths.filesystem(str(path))
        fs.delete_file(inner)


def _writer(location: str) -> dcp.FileSystemWriter:
    if not paths.is_uri(location):
        return dcp.FileSystemWriter(location)
    writer = dcp.FileSystemWriter(location, sync_files=False)
    writer.fs, writer.path = _ArrowFileSystem(), location
    return writer


def reader(location: str) -> dcp.FileSystemReader:
    if not paths.is_uri(location):
        return dcp.FileSystemReader(location)
    storage = dcp.FileSystemReader(location)
    storage.fs, storage.path = _ArrowFileSystem(), location
    return storage


def _leaves(tensors: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Qualified names in nested dictionaries, as torch's checkpoints write them."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def read_metadata(location: str) -> dict[str, Any]:
    """Qualified tensor name → metadata (shape, dtype) of everything in a checkpoint."""
    return dict(reader(location).read_metadata().state_dict_metadata)
