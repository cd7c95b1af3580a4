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
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ft import hub, paths
from ray_ft.data import duplicates, sources
from ray_ft.data import identity as identities
from ray_ft.data import tokenizer as tokenizers
from ray_ft.data.checks import WAYS_BACK, all_files, check, check_before, check_stamp, check_unchanged
from ray_ft.data.counts import TOO_LONG, Counts
from ray_ft.data.files import File
from ray_ft.data.images import ImageReader
from ray_ft.data.lines import Reject
from ray_ft.data.pack import REAL, TRAINED, pack
from ray_ft.data.prepared import Origin, Prepared, Split, Unit, shard_name, vision_of
from ray_ft.data.render import Renderer, Tokens, load_tokenizer
from ray_ft.data.rows import columns_used, to_sample
from ray_ft.data.shard import Segment, ShardWriter
from ray_ft.data.sources import Chunk
from ray_ft.data.vision import load_vision
from ray_ft.errors import DataError, ModelError
from ray_ft.recipe import AnySource, Images, LabelsSource, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMAT", "Prepared", "Split", "check", "load", "prepare"]

FORMAT = 2  # part of the key: raise it when the same input would give other rows, or the index another form
SEGMENT_TOKENS = 2 << 20  # tokens packed together; one Parquet row group, 10 MB in memory
SEGMENT_IMAGE_BYTES = 64 << 20  # images of rows packed together, at which a segment ends as well
TASKS = 256  # chunks up to this number have a task each; a task costs some 10 ms, whatever little is in it
ENCODE_BATCH = 512  # samples per call of the tokenizer
ENCODE_IMAGES = 32  # the same, in a run with images, whose files are held meanwhile

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
        "cut": {"chunk_bytes": sources.CHUNK_BYTES, "segment_tokens": SEGMENT_TOKENS},
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
        _run(_Work.of(recipe, split, location, model_folder, identity), chunks, cached, identity, spread, on_progress)
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
    content = paths.read_json(stats)
    if "identity" not in content:  # of an older version
        return None
    identity, units, origins = content["identity"], [], []
    for number, (file, _, _, before, groups) in enumerate(content["chunks"]):
        source, name = identity["files"][file][:2]
        units += [Unit(number, group, rows, source, first) for group, (rows, first) in enumerate(groups)]
        origins.append(Origin(name, before))
    render = None
    if not content["cached"]:
        files = _files_of(identity, all_files(getattr(recipe.data, split)))
        chunks = [Chunk(files[at][0], files[at][1], start, stop) for at, start, stop, *_ in content["chunks"]]
        render = _Again(_Work.of(recipe, split, location, model_folder, identity), tuple(chunks))
    counts = Counts.from_json(content["counts"])
    processor = _elsewhere(recipe, model_folder) if "images" in identity else None
    return Prepared(
        location, content["seq_len"], counts, tuple(units), tuple(origins), reused, render, processor=processor
    )


def _elsewhere(recipe: Recipe, model_folder: str) -> str:
    """What other nodes resolve the model by: a hub id or a URI is not where this node has put it."""
    return model_folder if os.path.isdir(recipe.model.path) else recipe.model.location


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


# ------------------------------------------------------------------------------------------------------- the work


@lru_cache(maxsize=4)
def _tokenizer_of(model: str, code: bool) -> PreTrainedTokenizerBase:
    """Resolved once per process, not per chunk: a hub id asks the hub, a URI lists the storage."""
    return load_tokenizer(hub.model_folder(model, weights=False, code=code))


@dataclass
class _Seen:
    """What became of a chunk's rows; `lines` counts the lines passed."""

    counts: Counts = field(default_factory=Counts)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    lines: int = 0


@dataclass(frozen=True)
class _Work:
    """What one chunk's work needs to know; travels to the task that does it."""

    location: str
    model_folder: str
    sources: tuple[AnySource, ...]
    seq_len: int
    packing: bool
    long_rows: str
    segment_tokens: int
    tokenizer: dict[str, Any]
    """What `tokenizer.identity` said."""
    code: bool
    """Whether code in the model's folder may run, as the recipe's model.trust_remote_code says."""
    labels: tuple[str, ...] = ()
    """The recipe's model.labels."""
    images: Images | None = None
    """The recipe's data.images."""

    @classmethod
    def of(cls, recipe: Recipe, split: Split, location: str, model_folder: str, identity: dict[str, Any]) -> _Work:
        model = _elsewhere(recipe, model_folder)
        tokenizer = {name: identity[name] for name in ("tokenizer", "template")}
        wanted, segment_tokens = tuple(getattr(recipe.data, split)), identity["cut"]["segment_tokens"]
        return cls(
            location, model, wanted, **identity["layout"], segment_tokens=segment_tokens, tokenizer=tokenizer,
            code=recipe.model.trust_remote_code, labels=tuple(recipe.model.labels), images=recipe.data.images,
        )  # fmt: skip

    def segments(self, chunk: Chunk, seen: _Seen, first: int = 1) -> Iterator[Segment]:
        """The packed rows of a chunk, segment by segment; what became of its rows is added to `seen`.

        Args:
            first: line of the chunk to begin at: that of an earlier call's segment, which then comes first.
        """
        tokenizer = _tokenizer_of(self.model_folder, self.code)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        counts, labelled = seen.counts, isinstance(self.sources[chunk.source], LabelsSource)
        pending: list[Tokens] = []
        lines: list[int] = []
        size = image_bytes = 0

        def packed() -> Segment:
            rows, members = pack(
                pending, self.seq_len, packing=self.packing, pad_id=pad_id, images=self.images is not None
            )
            counts.tokens += int(np.count_nonzero(rows.flags & REAL))
            counts.trained_tokens += int(np.count_nonzero(rows.flags & TRAINED))
            counts.packed += len(rows)
            segment = Segment(rows, [[lines[i] for i in row] for row in members], first)
            pending.clear()
            lines.clear()
            return segment

        vision = vision_of(self.model_folder) if self.images else None
        for line, result in self._samples(chunk, Renderer(tokenizer, self.seq_len, vision), first):
            seen.lines = line
            if result is None:
                continue
            counts.rows += 1
            if isinstance(result, Tokens):
                counts.lengths[1 << max(len(result) - 1, 0).bit_length()] += 1
                result, cut = self._fit(result)
                counts.truncated += cut
            if isinstance(result, Reject):
                counts.rejected[result.reason] += 1
                seen.rejects.append({"file": chunk.file.name, "line": line, **asdict(result)})
                continue
            counts.used += 1
            if labelled:
                counts.labels[f"{chunk.source}/{result.ids[-1]}"] += 1
            seen.hashes.append(duplicates.row_hash(result))
            pending.append(result)
            lines.append(line)
            size += len(result)
            image_bytes += sum(map(len, result.images))
            if size >= self.segment_tokens or image_bytes >= SEGMENT_IMAGE_BYTES:
                yield packed()
                size, image_bytes, first = 0, 0, line + 1
        if pending:
            yield packed()

    def _samples(self, chunk: Chunk, renderer: Renderer, first: int) -> Iterator[tuple[int, Tokens | Reject | None]]:
        """(line, tokens or why there are none) for every row from line `first` on, in order; None for a blank line."""
        source = self.sources[chunk.source]
        images = ImageReader.of(chunk.file, self.images)
        waiting: list[tuple[int, Any]] = []

        def encoded() -> Iterator[tuple[int, Tokens | Reject | None]]:
            tokens = iter(renderer.encode([s for _, s in waiting if s is not None and not isinstance(s, Reject)]))
            for line, sample in waiting:
                yield line, sample if sample is None or isinstance(sample, Reject) else next(tokens)
            waiting.clear()

        for row in sources.read_rows(chunk, columns_used(source)):
            if row.line < first:
                continue
            content: Any = row.content
            if isinstance(content, dict):
                content = to_sample(source, content, renderer.special, labels=self.labels, images=images)
            waiting.append((row.line, content))
            if len(waiting) == (ENCODE_IMAGES if images else ENCODE_BATCH):
                yield from encoded()
        yield from encoded()

    def _fit(self, tokens: Tokens) -> tuple[Tokens | Reject, bool]:
        """The sample if it fits, cut or rejected as the recipe says; and whether it was cut. A pair is never cut."""
        cut = len(tokens) > self.seq_len
        if cut and (self.long_rows == "drop" or tokens.images):  # a part of an image is none
            more = "" if tokens.whole else "more than "
            return Reject(TOO_LONG, f"{more}{len(tokens)} tokens, data.seq_len is {self.seq_len}"), False
        if cut:
            tokens = tokens.cut(self.seq_len)
        documents = np.split(tokens.trained, [tokens.rejected_at] if tokens.rejected_at else [])
        if not all(document.any() for document in documents):
            detail = f"the answer begins after token {self.seq_len}" if cut else "no token of it is a target"
            return Reject("nothing to train on", detail), False
        return tokens, cut


@dataclass(frozen=True)
class _Prepare:
    """Prepares chunks: writes the shard of each, where tokens are kept, and returns what was counted of each."""

    work: _Work
    cached: bool

    def __call__(self, items: Sequence[tuple[int, Chunk]]) -> list[dict[str, Any]]:
        return [self._one(number, chunk) for number, chunk in items]

    def _one(self, number: int, chunk: Chunk) -> dict[str, Any]:
        seen, groups = _Seen(), []
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

    work: _Work
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
        if _tokenizer_identity(self.work.model_folder, self.work.code) != self.work.tokenizer:
            raise ModelError(
                f"the tokenizer or chat template in {self.work.model_folder!r} is not the one that the data was "
                "prepared with",
                ["give every node the same model folder", "train under another run.name if it was changed on purpose"],
            )
        at: int | None = None
        segments: Iterator[Segment] = iter(())
        for unit in units:
            if unit.group != at:  # not the next one of those that are being made
                segments = self.work.segments(chunk, _Seen(), unit.first)
            segment = next(segments, None)
            if segment is None or len(segment.rows) != unit.rows:
                raise DataError(
                    f"{chunk.file.name} gives other rows than when it was prepared, though its size and time are the "
                    "same",
                    WAYS_BACK,
                )
            yield segment
            at = unit.group + 1


@lru_cache(maxsize=4)
def _tokenizer_identity(model: str, code: bool) -> dict[str, Any]:
    return tokenizers.identity(_tokenizer_of(model, code))


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
    work: _Work,
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
