"""Rows to packed rows, once: read, check, tokenize, pack, count.

Ray Data spreads the chunks over the cluster; each is a pure function of its bytes, so the result does not depend on
timing or on the number of nodes. Memory is bounded by one segment (`SEGMENT_TOKENS`) per running task, whatever the
size of the data. The result is kept beside the runs under a key made of everything it depends on, and is shared by all
runs that agree on it: training starts with its total number of steps known, no GPU waits for a tokenizer, and resuming
or a further epoch tokenizes nothing again. It costs about 2 bytes of storage per token; with `data.cache: off` only the
index and the rejects are kept, and chunks are rendered again when their rows are read.

    <storage>/_prepared/<key>/ shards/000000.parquet …  rejects.jsonl  stats.json (written last: the commit)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ray_ft import collector, paths
from ray_ft.data import duplicates, sources
from ray_ft.data import identity as identities
from ray_ft.data import tokenizer as tokenizers
from ray_ft.data import work as works
from ray_ft.data.checks import WAYS_BACK, all_files, check, check_before, check_stamp, check_unchanged
from ray_ft.data.counts import Counts
from ray_ft.data.files import File
from ray_ft.data.prepared import Origin, Prepared, Split, Unit, shard_name
from ray_ft.data.render import load_tokenizer
from ray_ft.data.shard import Segment, ShardWriter
from ray_ft.data.sources import Chunk
from ray_ft.data.vision import load_vision
from ray_ft.data.work import Seen, Work, elsewhere, tokenizer_identity
from ray_ft.errors import DataError, ModelError
from ray_ft.recipe import AnySource, Recipe

__all__ = ["FORMAT", "Prepared", "Split", "check", "load", "prepare"]

FORMAT = 2  # part of the key: raise it when the same input would give other rows, or the index another form
TASKS = 256  # chunks up to this number have a task each; a task costs some 10 ms, whatever little is in it

#: Applies a function to every item, anywhere, and yields the results in the order of the items.
Spread = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


def prepare(
    recipe: Recipe,
    split: Split,
    model_folder: str,
    spread: Spread,
    on_progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Prepare one split of the recipe's data, or find it prepared.

    Args:
        model_folder: local folder of the model whose tokenizer and chat template are used.
        spread: how chunks are processed: `stream.spread` on Ray, `stream.in_process` without.
        on_progress: called with (chunks done, chunks in all).

    Raises:
        DataError: a path matches no file, a Parquet file lacks a column or does not open, or a file changed meanwhile.
        ModelError: no usable tokenizer, or no chat template where the format needs one.
    """
    wanted: Sequence[AnySource] = getattr(recipe.data, split)
    files = all_files(wanted)
    memo = tokenizers.Memo(model_folder, recipe.run.storage)
    tokenizer = memo.known or tokenizers.identity(load_tokenizer(model_folder))
    memo.found(tokenizer)
    identity = {
        "format": FORMAT,
        "sources": identities.of_sources(wanted),
        "files": identities.of_files(files),
        **tokenizer,
        "layout": {
            "seq_len": recipe.data.seq_len,
            "packing": recipe.data.packing,
            "long_rows": recipe.data.long_rows,
        },
        "cut": {"chunk_bytes": sources.CHUNK_BYTES, "segment_tokens": works.SEGMENT_TOKENS},
        **({"labels": recipe.model.labels} if recipe.model.labels else {}),
    }
    if recipe.data.images:
        vision = load_vision(model_folder, load_tokenizer(model_folder))
        identity["images"] = {**recipe.data.images.model_dump(mode="json"), **vision.identity()}
    location = paths.join(recipe.run.storage, "_prepared", identities.key_of(identity))
    # Held-out rows are few and read again at every evaluation, by every worker: their tokens are always kept.
    cached = recipe.data.cache == "auto" or split == "eval"
    prepared = load(location, recipe, split, model_folder, reused=True)
    if prepared is None or (cached and prepared.render is not None):
        check_before(wanted, files, has_template=bool(tokenizer["template"][0]))
        chunks = [chunk for number, file in files for chunk in sources.chunks_of(file, number)]
        _run(Work.of(recipe, split, location, model_folder, identity), chunks, cached, identity, spread, on_progress)
        prepared = load(location, recipe, split, model_folder)
        assert prepared is not None
    memo.keep()
    return prepared


def load(location: str, recipe: Recipe, split: Split, model_folder: str, reused: bool = False) -> Prepared | None:
    """What was prepared at a location; None where nothing complete lies.

    Args:
        recipe, split, model_folder: as of `prepare`; only used where no tokens are stored.

    Raises:
        DataError: no tokens are stored, and a file is gone that they would be made of.
    """
    stats = paths.join(location, identities.STATS)
    if not paths.exists(stats):
        return None
    text = paths.read_bytes(stats)
    units: list[Unit] = []
    origins: list[Origin] = []
    with collector.paused():
        content = json.loads(text)
        if "identity" not in content:  # of an older version
            return None
        identity = content["identity"]
        for number, (file, _, _, before, groups) in enumerate(content["chunks"]):
            source, name = identity["files"][file][:2]
            units += [Unit(number, group, rows, source, first) for group, (rows, first) in enumerate(groups)]
            origins.append(Origin(name, before))
    render = None
    if not content["cached"]:
        files = _files_of(identity, all_files(getattr(recipe.data, split)))
        chunks = [Chunk(files[at][0], files[at][1], start, stop) for at, start, stop, *_ in content["chunks"]]
        render = _Again(Work.of(recipe, split, location, model_folder, identity), tuple(chunks))
    counts = Counts.from_json(content["counts"])
    processor = elsewhere(recipe, model_folder) if "images" in identity else None
    return Prepared(
        location, content["seq_len"], counts, tuple(units), tuple(origins), reused, render, processor=processor
    )


def _files_of(identity: dict[str, Any], found: Sequence[tuple[int, File]]) -> list[tuple[int, File]]:
    """The files of an index, with the stamps that they had; whether they still have them is looked at when reading."""
    there = {
        (number, name, query): file
        for (_, file), (number, name, _, query) in zip(found, identities.of_files(found), strict=True)
    }
    files = []
    for number, name, stamp, query in identity["files"]:
        file = there.get((number, name, query))
        if file is None:
            raise DataError(f"{name} is gone, and its tokens are not stored (data.cache: off)", WAYS_BACK)
        files.append((number, replace(file, stamp=stamp)))
    return files


@dataclass(frozen=True)
class _Prepare:
    """Prepares chunks: writes the shard of each, where tokens are kept, and returns what was counted of each."""

    work: Work
    cached: bool

    def __call__(self, items: Sequence[tuple[int, Chunk]]) -> list[dict[str, Any]]:
        return [self._one(number, chunk) for number, chunk in items]

    def _one(self, number: int, chunk: Chunk) -> dict[str, Any]:
        seen, groups = Seen(), []
        with ExitStack() as stack:
            writer = None
            if self.cached:
                location = paths.join(self.work.location, "shards", shard_name(number))
                images = self.work.images is not None
                writer = stack.enter_context(ShardWriter(location, self.work.seq_len, images))
            for segment in self.work.segments(chunk, seen):
                groups.append((len(segment.rows), segment.first))
                if writer:
                    writer.write(segment)
        lines = 0 if chunk.file.kind == "parquet" else seen.lines
        hashes = b"".join(seen.hashes)
        return {"groups": groups, "counts": seen.counts, "lines": lines, "rejects": seen.rejects, "hashes": hashes}


@dataclass(frozen=True)
class _Again:
    """Renders chunks again whose tokens are not stored."""

    work: Work
    chunks: tuple[Chunk, ...]

    def read(self, number: int, units: Sequence[Unit]) -> Iterator[Segment]:
        """The segments of some units of one chunk, which are in ascending order.

        Samples before a unit are read, but neither rendered nor tokenized.

        Raises:
            DataError: the file changed since it was prepared.
            ModelError: this node has another tokenizer.
        """
        chunk = self.chunks[number]
        check_stamp(chunk.file)
        if tokenizer_identity(self.work.model_folder, self.work.code) != self.work.tokenizer:
            raise ModelError(
                f"the tokenizer or chat template in {self.work.model_folder!r} is not the one that the data was "
                "prepared with",
                ["give every node the same model folder", "train under another run.name if it was changed on purpose"],
            )
        at: int | None = None
        segments: Iterator[Segment] = iter(())
        for unit in units:
            if unit.group != at:  # not the next one of those that are being made
                segments = self.work.segments(chunk, Seen(), unit.first)
            segment = next(segments, None)
            if segment is None or len(segment.rows) != unit.rows:
                raise DataError(
                    f"{chunk.file.name} gives other rows than when it was prepared, though its size and time are the "
                    "same",
                    WAYS_BACK,
                )
            yield segment
            at = unit.group + 1


def _grouped(chunks: Sequence[Chunk]) -> list[list[tuple[int, Chunk]]]:
    """The chunks with their numbers, in order; where there are more than `TASKS`, small neighbours are one task's."""
    most = max(len(chunks) // TASKS, 1)
    groups: list[list[tuple[int, Chunk]]] = []
    size = 0
    for number, chunk in enumerate(chunks):
        plain = chunk.file.kind == "jsonl" and not chunk.file.compression
        own = chunk.stop - chunk.start if plain else chunk.file.size
        if not groups or len(groups[-1]) == most or size + own > sources.CHUNK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((number, chunk))
        size += own
    return groups


def _run(
    work: Work,
    chunks: list[Chunk],
    cached: bool,
    identity: dict[str, Any],
    spread: Spread,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    total, index = Counts(), []
    hashes: list[bytes] = []  # 8 bytes a row
    numbers = {(source, name, query): at for at, (source, name, _, query) in enumerate(identity["files"])}
    before = 0  # lines of the file that lie in its earlier chunks
    with paths.Appender(paths.join(work.location, "rejects.jsonl")) as rejects:
        results = chain.from_iterable(spread(_Prepare(work, cached), _grouped(chunks)) if chunks else ())
        for done, (chunk, result) in enumerate(zip(chunks, results, strict=True), start=1):
            before = before if chunk.start else 0  # two sources may read one file
            total.add(result["counts"])
            hashes.append(result["hashes"])
            ((source, name, _, query),) = identities.of_files([(chunk.source, chunk.file)])
            index.append([numbers[source, name, query], chunk.start, chunk.stop, before, result["groups"]])
            for reject in result["rejects"]:
                reject["line"] += before
                rejects.write(json.dumps(reject, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            before += result["lines"]
            if on_progress:
                on_progress(done, len(chunks))
    check_unchanged(work.location, work.sources, identity)
    total.duplicates = duplicates.count(hashes)
    content = {
        "seq_len": work.seq_len,
        "cached": cached,
        "counts": total.to_json(),
        "identity": identity,
        # [number of the file, start, stop, lines before, [[rows, first line] of each unit]], a hundred bytes a chunk
        "chunks": index,
    }
    paths.write_text(paths.join(work.location, identities.STATS), json.dumps(content, ensure_ascii=False) + "\n")
