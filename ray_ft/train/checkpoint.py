"""Checkpoints: sharded, on any filesystem, and none counts before its COMMITTED marker is written.

    checkpoints/step_00000100-1f0c9a2b/ shard_00000.safetensors …  index.json  state.json  COMMITTED

Each attempt to save a step has a folder of its own (the hexadecimal part of the name is drawn at random): a worker that
was cut off from the others, and writes on while a new attempt has long begun, reaches no file of that attempt.
COMMITTED, written last, lists all files with their sizes, and the small ones with their checksums; those of the shards'
blocks are in the index. Tensors lie by qualified name, ``model/<parameter>`` and ``optim/<parameter>/<moment>``, as
runs of the flattened whole (see `shards`), so a checkpoint restores at another number of workers and under another
strategy. The newest valid one is used; a broken one is set aside under another name, never deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow.fs as pafs
import torch

from ray_ft import paths
from ray_ft.errors import CheckpointError, StorageError, first_line
from ray_ft.retry import patiently
from ray_ft.span import Span
from ray_ft.train import shards
from ray_ft.train.shards import Damaged, Stored, Written, checksum

FORMAT = 3
COMMITTED = "COMMITTED"
STATE = "state.json"
BROKEN = ".broken"
_NAME = re.compile(r"step_(\d{8,})(-[0-9a-f]+)?")
_AGAIN = ["train again: it is set aside, and the checkpoint before it is used"]

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A committed checkpoint; `state` is its state.json."""

    location: str
    step: int
    state: dict[str, Any]


class OtherFormat(CheckpointError):
    """A checkpoint that another version wrote."""


def name(step: int, attempt: str = "") -> str:
    """The folder of an attempt to save a step; "" of one that no other can meet."""
    return f"step_{step:08d}{f'-{attempt}' if attempt else ''}"


def folders(folder: str) -> list[tuple[int, str]]:
    """(step, location) of all that lies in a run's checkpoints folder, oldest first, committed or not.

    Raises:
        StorageError: storage does not answer.
    """
    found = [(match, entry) for entry in _reach(folder, paths.list_dir) if (match := _NAME.fullmatch(entry))]
    return sorted((int(match[1]), paths.join(folder, entry)) for match, entry in found)


def committed(folder: str) -> list[tuple[int, str]]:
    """Those of `folders` that have their marker; none is opened."""
    return [(step, location) for step, location in folders(folder) if is_committed(location)]


def is_committed(location: str) -> bool:
    return _reach(paths.join(location, COMMITTED), paths.exists)


def steps(folder: str) -> list[int]:
    """Steps of all committed checkpoints in a run's checkpoints folder, oldest first; none is opened."""
    return sorted({step for step, _ in committed(folder)})


def newest_step(folder: str) -> int:
    """The last of `steps`, or 0; markers are looked for from the newest on, so that older ones cost nothing."""
    return next((step for step, location in reversed(folders(folder)) if is_committed(location)), 0)


def _reach(location: str, call: Callable[[str], T]) -> T:
    """``call(location)``, again where storage fails for a moment.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: storage does not answer; that says nothing about what lies there.
    """
    try:
        return patiently(lambda: call(location))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreachable(location, error) from error


def _unreachable(location: str, error: OSError) -> StorageError:
    return StorageError(
        f"{location} cannot be read: {first_line(error)}",
        [
            "check that every node reaches run.storage, and its credentials",
            "train again once it does: checkpoints are left as they are",
        ],
    )


# ------------------------------------------------------------------------------------------------------------ reading


def newest(folder: str, on_broken: Callable[[str, str], None] | None = None) -> Found | None:
    """The newest checkpoint whose files are all there in full, or None.

    Sizes and the small files are checked here, blocks of tensors as they are read.

    Args:
        on_broken: called with (location, why) for each newer one that is not; without it they are only passed over,
            with it they are also set aside, and the location is the new one. What was never committed is left where
            it is and not spoken of: it is what a killed run leaves.

    Raises:
        OtherFormat: the newest one was written by another version; it is not broken, and to begin anew would throw
            the run away.
        StorageError: storage does not answer, after several attempts.
    """
    for step, location in reversed(folders(folder)):
        if not is_committed(location):  # asked one by one: each is a request to storage
            continue
        try:
            return Found(location, step, verify(location))
        except Damaged as error:
            if not is_committed(location):  # deleted meanwhile, by a command that has newer ones
                continue
            if on_broken is not None:
                on_broken(set_aside(location, error.what), error.what)
    return None


def verify(location: str) -> dict[str, Any]:
    """state.json of a checkpoint whose marker, sizes and small files are as they were written.

    Raises:
        Damaged: they are not.
        OtherFormat: another version wrote it.
        StorageError: storage does not answer.
    """
    files = _listing(location)

    def infos(_: str) -> list[pafs.FileInfo]:
        fs, _ = paths.filesystem(location)
        return fs.get_file_info([paths.filesystem(paths.join(location, file))[1] for file in files])

    for (file, facts), info in zip(files.items(), _reach(location, infos), strict=True):
        if info.type != pafs.FileType.File:
            raise _damaged(location, file, "is missing")
        if info.size != facts["bytes"]:
            raise _damaged(location, file, f"has {info.size} bytes, {facts['bytes']} were committed")
    _checked(location, shards.INDEX, files)
    return json.loads(_checked(location, STATE, files))


def index(location: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name.

    Raises:
        Damaged, OtherFormat, StorageError: as for `verify`.
    """
    return shards.parse_index(_checked(location, shards.INDEX, _listing(location)))


def _listing(location: str) -> dict[str, dict[str, int]]:
    """The files that a checkpoint's marker lists."""
    raw = _read(location, COMMITTED)
    try:
        marker = json.loads(raw)
        if marker["checksum"] == checksum(_canonical(marker["files"], marker["format"])):
            if marker["format"] != FORMAT:
                raise _other_format(location, marker["format"])
            return marker["files"]
        why = "its checksum does not fit its content"
    except KeyError:  # up to format 2 it had no checksum
        with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
            if (found := json.loads(_read(location, STATE))["format"]) in (1, 2):
                raise _other_format(location, found) from None
        why = "it lacks what it should hold"
    except (ValueError, TypeError) as error:
        why = first_line(error)
    raise _damaged(location, COMMITTED, f"is not what was written: {why}")


def _other_format(location: str, found: Any) -> OtherFormat:
    return OtherFormat(
        f"{location} is in format {found!r}, this version reads {FORMAT}",
        ["continue it with the version that wrote it", "train under another run.name"],
    )


def _canonical(files: Any, form: Any) -> bytes:
    return json.dumps([form, files], sort_keys=True).encode()


def _checked(location: str, file: str, files: dict[str, dict[str, int]]) -> bytes:
    content = _read(location, file)
    facts = files.get(file)
    if facts is None:
        raise _damaged(location, file, f"is not listed in {COMMITTED}")
    if len(content) != facts["bytes"] or checksum(content) != facts["checksum"]:
        raise _damaged(location, file, "has other bytes than were committed")
    return content


def _read(location: str, file: str) -> bytes:
    try:
        return _reach(paths.join(location, file), paths.read_bytes)
    except FileNotFoundError:
        raise _damaged(location, file, "is missing") from None


def _damaged(location: str, file: str, what: str) -> Damaged:
    return Damaged(f"{paths.join(location, file)} {what}", _AGAIN, file)


def set_aside(location: str, why: str) -> str:
    """Rename a broken checkpoint to `<name>.broken`, or `<name>.broken-2` and so on where there was one before.

    Args:
        why: is written into it, for whoever finds it.

    Returns:
        where it is now.
    """
    head = paths.add_suffix(location, BROKEN)
    names = itertools.chain([head], (paths.add_suffix(head, f"-{number}") for number in itertools.count(2)))
    aside = next(candidate for candidate in names if not _reach(candidate, paths.exists))
    try:
        patiently(lambda: paths.move(location, aside))
    except OSError as error:
        raise StorageError(
            f"{location} is broken ({why}) and cannot be renamed: {first_line(error)}",
            ["rename or delete it, then train again", "check the rights to run.storage"],
        ) from error
    with contextlib.suppress(OSError):  # the disk may be full; it is said elsewhere too
        paths.write_text(paths.join(aside, "WHY"), why + "\n")
    return aside


def restore(location: str, spans: Mapping[str, Span], *, partial: bool = False) -> None:
    """Fill spans from a checkpoint in place, whatever the strategy and number of workers that wrote it.

    Of a section that is asked for ("model", "optim"), all of it has to be: a trained parameter left out would silently
    be the base's again. With `partial` the caller sees to that.

    Raises:
        CheckpointError: it lacks one of them or has one more, or one has another shape.
        Damaged: bytes of it are not those that were written; spans may be filled in part.
        StorageError: storage does not answer, after several attempts.
    """
    asked = set() if partial else _asked(spans)  # before anything that may fail on one worker alone
    stored = index(location)
    sections = {key.partition("/")[0] for key in spans}
    more = set() if partial else {key for key in stored if key.partition("/")[0] in sections} - asked
    for what, names in (("lacks", spans.keys() - stored.keys()), ("also holds", more)):
        if names:
            raise _misfit(
                location, f"it {what} {', '.join(sorted(names)[:3])}{f' … ({len(names)})' if len(names) > 3 else ''}"
            )
    for key, span in spans.items():
        if stored[key].shape != span.shape:
            raise _misfit(location, f"{key} has shape {stored[key].shape} there, {span.shape} here")
    try:
        shards.read(location, stored, spans)
    except OSError as error:
        raise _unreachable(location, error) from error


def _misfit(location: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{location} does not fit this recipe: {what}",
        [
            "train under another run.name",
            "or with the model, optimizer, adapter and frozen parameters that it was written with",
        ],
    )


def _asked(spans: Mapping[str, Span]) -> set[str]:
    """What all workers ask for: of a parameter that lies on another worker as a whole, one has no moments."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return set(spans)
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, set(spans))
    return set().union(*names)


# ------------------------------------------------------------------------------------------------------------ writing


def save(folder: str, step: int, spans: Mapping[str, Span], state: dict[str, Any], rank: int, world: int) -> str:
    """Write a checkpoint and wait for it; every rank calls it. Returns its location. Training uses `saver.Saver`.

    Args:
        spans: what this rank holds, by qualified name.
        state: what state.json holds besides the format and the step.
    """
    location = paths.join(folder, name(step))
    if rank == 0:
        paths.delete_dir(location)
    _barrier(world)
    written = shards.write(location, rank, spans)
    parts: list[Any] = [written]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, written)
    if rank == 0:
        commit(location, step, parts, state)
    _barrier(world)
    return location


def commit(location: str, step: int, parts: Sequence[Written], state: dict[str, Any]) -> None:
    """Write index, state and, last, the marker.

    Args:
        parts: what each worker wrote.

    Raises:
        CheckpointError: a shard is not there in full, or the shards do not make up the whole tensors.
        OSError: storage failed, after several attempts.
    """
    fs, _ = paths.filesystem(location)
    sizes = {part["file"]: part["bytes"] for part in parts}
    paths_of = [paths.filesystem(paths.join(location, file))[1] for file in sizes]
    infos = patiently(lambda: fs.get_file_info(paths_of))
    found = {file: info.size for file, info in zip(sizes, infos, strict=True)}
    if lost := [file for file, size in sizes.items() if found[file] != size]:
        raise incomplete(location, lost)
    files: dict[str, dict[str, int]] = {file: {"bytes": size} for file, size in sizes.items()}
    details = json.dumps({"format": FORMAT, "step": step, **state}, indent=2, ensure_ascii=False) + "\n"
    for file, content in ((shards.INDEX, shards.index_of(parts)), (STATE, details.encode())):
        _write(paths.join(location, file), content)
        files[file] = {"bytes": len(content), "checksum": checksum(content)}
    marker = {"format": FORMAT, "checksum": checksum(_canonical(files, FORMAT)), "files": files}
    _write(paths.join(location, COMMITTED), json.dumps(marker, indent=2).encode())


def _write(location: str, content: bytes) -> None:
    patiently(lambda: paths.write_bytes(location, content))


def incomplete(location: str, lost: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{location} lacks {', '.join(lost[:3])}, which other workers wrote",
        ["run.storage must be one place that every node reaches"],
    )


def retain(folder: str, keep: int, say: Callable[[str], None] = lambda line: None) -> None:
    """Delete committed checkpoints older than the newest `keep` valid ones.

    Each of those is checked as by `newest` before an older one goes: one that is known to be broken is no reason to
    delete the one that a run would fall back to. What fails is said and stays for the next time.
    """
    if len(folders(folder)) <= keep:  # the usual case of a sweep that keeps all: nothing can go, so nothing is read
        return
    valid = 0
    for _, location in reversed(committed(folder)):
        if valid < keep:
            try:
                verify(location)
                valid += 1
            except CheckpointError as error:
                say(f"{error.what}; an older checkpoint is kept for it")
        else:
            delete(location, say)


def delete(location: str, say: Callable[[str], None]) -> None:
    """Delete a checkpoint's folder, its marker first, so that half of one never counts; a failure is said."""
    try:
        with contextlib.suppress(FileNotFoundError):
            patiently(lambda: paths.delete_file(paths.join(location, COMMITTED)))
        patiently(lambda: paths.delete_dir(location))
    except OSError as error:
        say(f"{location} could not be deleted: {first_line(error)}")


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
