"""A demo's folder: written once, reused by the same call, replaced by another."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ray_ft import paths
from ray_ft.demo import labels, mixture, preference, reasoning, translation, vision
from ray_ft.demo.task import Part, Row, Task
from ray_ft.errors import DataError

MARKER = "demo.json"
FORMAT = 2  # of the folder's content; raised whenever the same settings would give something else
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")

TASKS: dict[str, Task] = {
    "translation": translation.TASK,
    "reasoning": reasoning.TASK,
    "mixture": mixture.TASK,
    "labels": labels.TASK,
    "preference": preference.TASK,
    "vision": vision.TASK,
}
"""Name → what is drawn; `ray-ft demo --task NAME`."""


@dataclass(frozen=True)
class DemoPaths:
    """What `write_demo` made.

    Attributes:
        folder: the folder that holds everything below.
        base: Hugging Face folder of the untrained model and its tokenizer.
        train: files of training rows: JSONL, gzipped JSONL, Parquet; of a task with several parts each part's.
        heldout: Parquet file of held-out rows; of a task with several parts the folder with one for each.
        reused: all of it was there already, from the same settings.
    """

    folder: str
    base: str
    train: tuple[str, ...]
    heldout: str
    reused: bool = False


def write_demo(
    folder: str = "demo",
    seed: int = 0,
    *,
    task: str = "translation",
    rows: int | None = None,
    hidden_size: int = 128,
    layers: int | None = None,
) -> DemoPaths:
    """Write the demo, or reuse what an earlier call with the same settings left in `folder`.

    Args:
        folder: a local folder, created where missing. An earlier demo in it is replaced; anything else is refused.
        seed: of the rows drawn, their order and the base's weights.
        task: one of `TASKS`.
        rows: training rows; None: as many as the task has by itself.
        hidden_size: width of the base.
        layers: layers of the base, with sliding-window and with full attention in turn; None: as the task has them.

    Raises:
        DataError: the folder holds something that is no demo, or is remote; there is no such task, or not that many
            rows of it.
    """
    if task not in TASKS:
        raise DataError(f"there is no demo of {task!r}", [f"one of {', '.join(TASKS)}"])
    if paths.is_uri(folder):
        raise DataError(f"the demo cannot be written to {folder!r}", ["name a local folder"])
    root = paths.absolute(folder)
    parts = {part: _Files.of(root, part) for part in TASKS[task].parts}
    files = tuple(file for part in parts.values() for file in part.train)
    heldout = paths.join(root, "heldout") if len(parts) > 1 else next(iter(parts.values())).heldout
    demo = DemoPaths(root, paths.join(root, "base"), files, heldout)
    marker = paths.join(root, MARKER)
    rows = TASKS[task].rows if rows is None else rows
    layers = TASKS[task].layers if layers is None else layers
    size = {"rows": rows, "hidden_size": hidden_size, "layers": layers}
    settings = {"format": FORMAT, "task": task, "seed": seed, **size}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    old: list[str] = []  # files of an earlier demo, begun or done
    if paths.exists(marker):
        found = paths.read_json(marker)
        complete = found["files"] and all(paths.exists(paths.join(root, name)) for name in found["files"])
        if complete and found["key"] == key:
            return replace(demo, reused=True)
        old = [*found["files"], *found.get("begun", [])]
    elif paths.list_dir(root):
        raise DataError(f"{folder!r} holds files, but no {MARKER}: it is no demo", ["name another folder"])

    drawn = TASKS[task].draw(rows, seed)
    contents = {file: content for name, part in drawn.items() for file, content in _contents(part, parts[name])}
    written = list(contents)
    # Named before anything is written, so that an interrupted call leaves a folder that the next one may replace.
    begun = {os.path.relpath(name, root) for name in written}
    paths.write_json(marker, {"key": key, "settings": settings, "files": [], "begun": sorted({*old, *begun})})
    for name in {*old} - begun:  # another task's rows must not stand among this one's
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, name))
    for file, content in contents.items():
        paths.write_bytes(file, content)
    texts = [text for part in drawn.values() for row in part.train for text in part.texts(row)]
    TASKS[task].write_base(demo.base, texts, seed, hidden_size, layers)
    written += [paths.join(demo.base, name) for name in paths.list_dir(demo.base)]
    paths.write_json(marker, {"key": key, "settings": settings, "files": [os.path.relpath(n, root) for n in written]})
    return demo


@dataclass(frozen=True)
class _Files:
    """Of one part."""

    train: tuple[str, ...]
    heldout: str

    @classmethod
    def of(cls, root: str, part: str) -> _Files:
        names = (f"part-{number}{ending}" for number, ending in enumerate(ENDINGS))
        train = tuple(paths.join(root, "train", *filter(None, (part, name))) for name in names)
        return cls(train, paths.join(root, *(("heldout", f"{part}.parquet") if part else ("heldout.parquet",))))


def _contents(part: Part, files: _Files) -> Iterator[tuple[str, bytes]]:
    """Each file of a part, those that its rows name among them, and what is in it."""
    placed = [(file, part.train[number :: len(files.train)]) for number, file in enumerate(files.train)]
    for file, rows in [*placed, (files.heldout, part.heldout)]:
        if part.stored is not None:
            ending = next(ending for ending in ENDINGS if file.endswith(ending))
            stored = [part.stored(row, ending) for row in rows]
            rows = [row for row, _ in stored]
            yield from ((paths.join(paths.parent(file), name), body) for _, own in stored for name, body in own.items())
        yield file, _encoded(file, rows)


def _encoded(file: str, rows: Sequence[Row]) -> bytes:
    """Rows in the format that the file's name tells; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows)), sink)
        return sink.getvalue().to_pybytes()
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    return gzip.compress(content, mtime=0) if file.endswith(".gz") else content
