"""Checkpoints as they grow: in bytes, tensors, shards (workers that write), runs, and in how many lie in the folder.

On the local disk. But for the first, they have a few KiB of values each, so that what is measured is all but the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence

import torch

from benchmarks.scale.growth import Series, measured, timed
from benchmarks.scale.storage import counted
from ray_ft import paths
from ray_ft.span import Span
from ray_ft.train import checkpoint, saver, shards
from ray_ft.train.saver import Saver

TENSORS = (10, 100, 1_000, 10_000)
SHARDS = (1, 8, 64, 512)
FOLDERS = (1, 10, 100, 1_000)
MEBIBYTES = (4, 16, 64, 256)
ELEMENTS = 1 << 20  # of all tensors together, whatever their number
TENSORS_IN_SHARDS = 100
INDEX = ("committing", "restoring one worker's part")
KEEP = 2


def spans_of(tensors: int, rank: int = 0, world: int = 1, elements: int = ELEMENTS) -> dict[str, Span]:
    """One worker's even share of `tensors` tensors of `elements` elements together."""
    size = max(elements // tensors, world)
    start, stop = size * rank // world, size * (rank + 1) // world
    values = torch.zeros(stop - start)
    return {f"model/layer.{at}.weight": Span(values, start, (size,)) for at in range(tensors)}


def _one_worker(folder: str, spans: dict[str, Span]) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    location = os.path.join(folder, checkpoint.name(1))
    parts: list[shards.Written] = []
    return {
        "writing": timed(lambda: parts.append(shards.write(location, 0, spans))),
        "committing": timed(lambda: checkpoint.commit(location, 1, parts, {})),
        "restoring": timed(lambda: checkpoint.restore(location, spans)),
    }


def by_bytes(folder: str, repeat: int, sizes: Sequence[int] = MEBIBYTES) -> list[Series]:
    """As many tensors, which hold more and more."""

    def run(size: int) -> dict[str, float]:
        return _one_worker(folder, spans_of(TENSORS_IN_SHARDS, elements=size << 18))  # of 4 bytes

    found = measured(sizes, run, repeat)
    dues = {"committing": 0.0}
    return [
        Series(f"checkpoint of many bytes, {name}", "MiB", "s", dues.get(name, 1.0), values)
        for name, values in found.items()
    ]


def by_tensors(folder: str, repeat: int, sizes: Sequence[int] = TENSORS) -> list[Series]:
    found = measured(sizes, lambda size: _one_worker(folder, spans_of(size)), repeat)
    return [Series(f"checkpoint, {name}", "tensors", "s", 1, values) for name, values in found.items()]


def by_shards(folder: str, repeat: int, sizes: Sequence[int] = SHARDS) -> list[Series]:
    """What rank 0 does to commit, and what each worker does to find its part again, by the number of workers."""

    def run(size: int) -> dict[str, float]:
        shutil.rmtree(folder, ignore_errors=True)
        seconds, asked, location = _committed(folder, size)
        mine = spans_of(TENSORS_IN_SHARDS, 0, size)
        return {
            "committing": seconds,
            "restoring one worker's part": timed(lambda: checkpoint.restore(location, mine, partial=True)),
            "requests of a commit": float(asked),
        }

    found = measured(sizes, run, repeat)
    return [
        Series(f"checkpoint of many workers, {name}", "workers", "requests" if "requests" in name else "s", 1, values)
        for name, values in found.items()
    ]


def by_runs(folder: str, repeat: int, indexes: Mapping[str, Mapping[int, tuple[int, int]]]) -> list[Series]:
    """Indexes as large as those of a large model: what rank 0 and each worker do, as in `by_shards`.

    Args:
        indexes: how the model is laid out → workers → (those of them that write weights, runs in all).
    """
    found = []
    for layout, fleets in indexes.items():

        def run(workers: int, fleets: Mapping[int, tuple[int, int]] = fleets) -> dict[str, float]:
            shutil.rmtree(folder, ignore_errors=True)
            owners, runs = fleets[workers]
            tensors = -(-runs // owners)  # the few that rank 0 writes alone are spread over the owners too
            seconds, _, location = _committed(folder, workers, tensors, owners)
            mine = spans_of(tensors, 0, owners)
            restoring = timed(lambda: checkpoint.restore(location, mine, partial=True))
            return {"committing": seconds, "restoring one worker's part": restoring}

        values = measured(sorted(fleets), run, repeat)
        found += [Series(index_name(layout, name), "workers", "s", 1, values[name]) for name in INDEX]
    return found


def index_name(layout: str, name: str) -> str:
    """Of the series in `by_runs`; `name` is one of `INDEX`."""
    return f"index of a 27B's checkpoint, {layout}, {name}"


def _committed(folder: str, workers: int, tensors: int = TENSORS_IN_SHARDS, owners: int = 0) -> tuple[float, int, str]:
    """(seconds, requests, where it is) of rank 0's commit, behind the back of training, once all have written.

    The saver is the product's; that of the other workers is played: their shards and parts lie where it looks for them.

    Args:
        owners: workers that write weights, the first ones; 0: all. The others' files hold nothing.
    """
    owners = owners or workers
    keeper = Saver(folder, KEEP, 0, workers, {}, True, print, f"{folder}-ledger")
    keeper._attempt = "5ca1e"  # hexadecimal; else it would ask the others for a name
    keeper.begin(1, spans_of(tensors, 0, owners))
    save = keeper._save
    assert save is not None
    for rank in range(1, workers):
        part = shards.write(save.location, rank, spans_of(tensors, rank, owners) if rank < owners else {})
        content = json.dumps({**part, "ledger": False}).encode()
        paths.write_bytes(paths.join(save.location, saver._part_name(rank)), content)
    while not any(keeper.signals()):
        save.changed.wait(0.01)
    assert save.written, save.reason
    with counted() as requests:
        began = time.perf_counter()
        save.changed.clear()
        keeper.advance(workers, 0, 0)
        while save.busy():
            save.changed.wait(0.01)
        seconds = time.perf_counter() - began
    assert save.committed, save.reason
    keeper.advance(workers, 0, 1)
    assert checkpoint.steps(folder) == [1], "the commit left no checkpoint"
    return seconds, requests.total(), save.location


def filled(folder: str, count: int) -> None:
    """A folder of `count` committed checkpoints: copies of one, whose marker names its files without their folder."""
    shutil.rmtree(folder, ignore_errors=True)
    first = os.path.join(folder, checkpoint.name(1))
    spans = spans_of(4, elements=64)
    checkpoint.commit(first, 1, [shards.write(first, 0, spans)], {})
    for step in range(2, count + 1):
        shutil.copytree(first, os.path.join(folder, checkpoint.name(step)))


def by_folder(folder: str, repeat: int, sizes: Sequence[int] = FOLDERS) -> list[Series]:
    """What lies in the folder already, when the newest is looked for and older ones are deleted."""

    def run(size: int) -> dict[str, float]:
        filled(folder, size)
        with counted() as to_find:
            finding = timed(lambda: checkpoint.newest(folder))
        with counted() as to_keep_all:
            keeping = timed(lambda: checkpoint.retain(folder, size))
        shutil.copytree(os.path.join(folder, checkpoint.name(1)), os.path.join(folder, checkpoint.name(size + 1)))
        with counted() as to_delete:
            deleting = timed(lambda: checkpoint.retain(folder, size))
        assert len(checkpoint.steps(folder)) == size, "retention kept another number than it was told"
        return {
            "finding the newest": finding,
            "retention that keeps all": keeping,
            "retention that deletes one": deleting,
            "finding the newest, requests": float(to_find.total()),
            "retention that keeps all, requests": float(to_keep_all.total()),
            "retention that deletes one, requests": float(to_delete.total()),
        }

    found = measured(sizes, run, repeat)
    # The listing names them all, so seconds may grow with them; what is asked of each of them may not.
    dues = {"finding the newest, requests": 0.0}
    return [
        Series(name, "checkpoints", "requests" if name.endswith("requests") else "s", dues.get(name, 1.0), values)
        for name, values in found.items()
    ]


def series(scratch: str, repeat: int, indexes: Mapping[str, Mapping[int, tuple[int, int]]]) -> list[Series]:
    folder = paths.join(scratch, "checkpoints")
    found = [*by_bytes(folder, repeat), *by_tensors(folder, repeat), *by_shards(folder, repeat)]
    return [*found, *by_runs(folder, repeat, indexes), *by_folder(folder, repeat)]
