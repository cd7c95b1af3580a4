"""Checkpoints: sharded, on any filesystem, and none counts before its COMMITTED marker is written.

    checkpoints/step_00000100/ shard_00000.safetensors …  index.json  state.json  COMMITTED (sizes of all files)

Tensors lie by qualified name, ``model/<parameter>`` and ``optim/<parameter>/<moment>``, as runs of the flattened whole
(see `shards`), so a checkpoint restores at another number of workers and under another strategy. The newest valid one
is used; a broken one is set aside under another name, never deleted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import torch

from ray_ft import paths
from ray_ft.errors import CheckpointError
from ray_ft.span import Span
from ray_ft.train import shards

FORMAT = 2
COMMITTED = "COMMITTED"
PREFIX = "step_"


@dataclass(frozen=True)
class Found:
    """A committed checkpoint; `state` is its state.json."""

    location: str
    step: int
    state: dict[str, Any]


class OtherFormat(CheckpointError):
    """A checkpoint that another version wrote."""


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
        except OtherFormat:
            raise  # it is not broken: to begin anew would throw the run away
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
        raise OtherFormat(
            f"{location} is in format {state['format']!r}, this version reads {FORMAT}",
            ["continue it with the version that wrote it", "train under another run.name"],
        )
    return state


def save(folder: str, step: int, spans: Mapping[str, Span], state: dict[str, Any], rank: int, world: int) -> str:
    """Write a checkpoint; every rank calls it. Returns its location.

    Args:
        spans: what this rank holds, by qualified name.
        state: what state.json holds besides the format and the step.
    """
    location = paths.join(folder, name(step))
    if rank == 0:
        paths.delete_dir(location)  # what an earlier attempt left without committing it
    _barrier(world)
    written = shards.write(location, rank, spans)
    everything: list[Any] = [None] * world
    if world > 1:
        torch.distributed.all_gather_object(everything, written)
    else:
        everything = [written]
    if rank == 0:
        shards.write_index(location, everything)
        paths.write_json(paths.join(location, "state.json"), {"format": FORMAT, "step": step, **state})
        fs, path = paths.filesystem(location)
        sizes = {info.base_name: info.size for info in fs.get_file_info(pafs.FileSelector(path))}
        if lost := [file for file, _ in everything if file not in sizes]:
            raise CheckpointError(
                f"{location} lacks {', '.join(lost[:3])}, which other workers wrote",
                ["run.storage must be one place that every node reaches"],
            )
        paths.write_json(paths.join(location, COMMITTED), {"files": sizes})
    _barrier(world)
    return location


def restore(location: str, spans: Mapping[str, Span], *, partial: bool = False) -> None:
    """Fill spans from a checkpoint in place, whatever the strategy and number of workers that wrote it.

    Of a section that is asked for ("model", "optim"), all of it has to be: a trained parameter left out would silently
    be the base's again. With `partial` the caller sees to that.

    Raises:
        CheckpointError: it lacks one of them or has one more, or one has another shape.
    """
    try:
        stored = shards.read_index(location)
        sections = {key.partition("/")[0] for key in spans}
        more = set() if partial else {key for key in stored if key.partition("/")[0] in sections} - _asked(spans)
        for what, names in (("lacks", spans.keys() - stored.keys()), ("also holds", more)):
            if names:
                raise ValueError(
                    f"it {what} {', '.join(sorted(names)[:3])}{f' … ({len(names)})' if len(names) > 3 else ''}"
                )
        for key, span in spans.items():
            if stored[key].shape != span.shape:
                raise ValueError(f"{key} has shape {stored[key].shape} there, {span.shape} here")
        shards.read(location, stored, spans)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{location} does not fit this recipe: {str(error).strip().splitlines()[-1][:300]}",
            [
                "train under another run.name",
                "or with the model, optimizer, adapter and frozen parameters that it was written with",
            ],
        ) from error


def _asked(spans: Mapping[str, Span]) -> set[str]:
    """What all workers ask for: of a parameter that lies on another worker as a whole, one has no moments."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return set(spans)
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, set(spans))
    return set().union(*names)


def retain(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints."""
    for step in steps(folder)[:-keep]:
        paths.delete_dir(paths.join(folder, name(step)))


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
