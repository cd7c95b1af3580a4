"""Rows to packed rows on storage, once: read, check, tokenize, pack, count.

Ray Data spreads the chunks over the cluster; each is a pure function of its bytes, so the result does not depend on
timing or on the number of nodes. Memory is bounded by one segment (`SEGMENT_TOKENS`) per running task, whatever the
size of the data. The result is kept beside the runs under a key made of everything it depends on, and is shared by all
runs that agree on it: training starts with its total number of steps known, no GPU waits for a tokenizer, and resuming
or a further epoch tokenizes nothing again. It costs about 2 bytes of storage per token.

    <storage>/_prepared/<key>/ shards/000000.parquet …  rejects.jsonl  stats.json (written last: the commit)
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_ft import paths
from ray_ft.data import sources
from ray_ft.data.pack import REAL, TRAINED, Rows, pack
from ray_ft.data.render import Renderer, Tokens, load_tokenizer
from ray_ft.data.rows import columns_used, to_sample
from ray_ft.data.sources import Chunk, Reject
from ray_ft.errors import DataError, ModelError
from ray_ft.recipe import AnySource, Recipe, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # part of the key: raise it when the same input would give other rows
SEGMENT_TOKENS = 2 << 20  # tokens packed together; one Parquet row group, 10 MB in memory
ENCODE_BATCH = 512  # samples per call of the tokenizer
TOO_LONG = "longer than seq_len"

Split = Literal["train", "eval"]
#: Applies a function to every item, anywhere, and yields the results in the order of the items.
Spread = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Unit:
    """One row group of packed rows: the smallest part that is read at once."""

    shard: str
    group: int
    rows: int


@dataclass
class Counts:
    """What happened to the rows of a chunk, or of all of them together."""

    rows: int = 0
    used: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    packed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Samples by token length, rounded up to a power of two."""

    def add(self, other: Counts) -> None:
        for name in ("rows", "used", "truncated", "packed", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rejected.update(other.rejected)
        self.lengths.update(other.lengths)

    @property
    def bad_share(self) -> float:
        """Share of rows that are faulty; one that is merely too long is not."""
        return (self.rejected.total() - self.rejected[TOO_LONG]) / max(self.rows, 1)

    def common_reasons(self, count: int = 3) -> list[str]:
        return [f"{number} × {reason}" for reason, number in self.rejected.most_common(count)]

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        counters = {
            "rejected": Counter(content["rejected"]),
            "lengths": Counter({int(k): v for k, v in content["lengths"].items()}),
        }
        return cls(**{**content, **counters})


@dataclass(frozen=True)
class Prepared:
    """Packed rows of one split, ready to be read in any order."""

    location: str
    seq_len: int
    counts: Counts
    units: tuple[Unit, ...]
    origins: dict[str, tuple[str, int]]
    """Shard → (file that its rows come from, lines of that file before the shard's)."""
    reused: bool = False

    @property
    def rows(self) -> int:
        """Packed rows: the unit of a batch."""
        return self.counts.packed

    @property
    def non_pad_share(self) -> float:
        return self.counts.tokens / max(self.counts.packed * self.seq_len, 1)

    @property
    def rejects(self) -> str:
        return paths.join(self.location, "rejects.jsonl")

    def read(self, units: Sequence[Unit]) -> Rows:
        """The rows of some units, one after the other, in memory."""
        parts, files = [], {}
        for unit in units:
            if unit.shard not in files:
                fs, path = paths.filesystem(paths.join(self.location, "shards", unit.shard))
                files[unit.shard] = pq.ParquetFile(fs.open_input_file(path))
            table = files[unit.shard].read_row_group(unit.group, columns=["input_ids", "flags"])
            parts.append(Rows(*(_matrix(table.column(name), self.seq_len) for name in ("input_ids", "flags"))))
        return Rows.concatenate(parts)

    def names(self, unit: Unit, row: int) -> list[str]:
        """``file:line`` of the samples that share one packed row."""
        fs, path = paths.filesystem(paths.join(self.location, "shards", unit.shard))
        group = pq.ParquetFile(fs.open_input_file(path)).read_row_group(unit.group, columns=["lines"])
        file, before = self.origins[unit.shard]
        return [f"{file}:{before + line}" for line in group.column("lines")[row].as_py()]

    def summary(self) -> str:
        """What became of the rows, in a line."""
        c = self.counts
        long = c.rejected[TOO_LONG]
        parts = [f"{c.rows:,} rows", f"{c.rejected.total() - long:,} rejected"]
        parts += [f"{long:,} over {self.seq_len} tokens left out"] * bool(long) + [f"{c.truncated:,} cut"] * bool(
            c.truncated
        )
        return ", ".join([*parts, f"{c.packed:,} packed rows, {self.non_pad_share:.1%} of them real tokens"])

    def stats(self) -> dict[str, Any]:
        """What `data/stats.json` of a run says."""
        return {
            "location": self.location,
            "seq_len": self.seq_len,
            "non_pad_share": round(self.non_pad_share, 4),
            **self.counts.to_json(),
        }


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
        DataError: a path matches no file, or a Parquet file lacks a column or does not open.
        ModelError: no usable tokenizer, or no chat template where the format needs one.
    """
    wanted: Sequence[AnySource] = getattr(recipe.data, split)
    files = [(number, file) for number, source in enumerate(wanted) for file in sources.find_files(source)]
    tokenizer = load_tokenizer(model_folder)
    _check_before(wanted, files, has_template=bool(tokenizer.chat_template))
    identity = {
        "format": FORMAT,
        "sources": [source.model_dump(mode="json") for source in wanted],
        "files": [[number, file.uri, file.stamp] for number, file in files],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "layout": [
            recipe.data.seq_len,
            recipe.data.packing,
            recipe.data.long_rows,
            sources.CHUNK_BYTES,
            SEGMENT_TOKENS,
        ],
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    location = paths.join(recipe.run.storage, "_prepared", key)
    prepared = load(location, reused=True)
    if prepared is None:
        # Other nodes resolve the model themselves: a hub id or a URI is not where this node has put it.
        model = model_folder if os.path.isdir(recipe.model.path) else recipe.model.path
        work = _Work(location, model, tuple(wanted), recipe.data.seq_len, recipe.data.packing, recipe.data.long_rows)
        chunks = [chunk for number, file in files for chunk in sources.chunks_of(file, number)]
        _run(work, chunks, spread, on_progress)
        prepared = load(location)
        assert prepared is not None
    return prepared


def _check_before(wanted: Sequence[Source], files: Sequence[tuple[int, sources.File]], has_template: bool) -> None:
    for number, file in files:
        if file.kind == "parquet":
            have = sources.parquet_columns(file)
            if missing := sorted(columns_used(wanted[number]) - set(have)):
                raise DataError(
                    f"{file.uri} lacks column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, have))}",
                    [
                        "name the right columns in the source's *_field settings",
                        "choose another format for this source",
                    ],
                )
    if not has_template:
        chatty = [s for s in wanted if getattr(s, "chat", s.format not in ("text",))]  # type: ignore[attr-defined]
        if chatty:
            raise ModelError(
                f"format {chatty[0].format!r} needs a chat template and the model's tokenizer has none",  # type: ignore[attr-defined]
                ["add chat_template.jinja to the model folder", "use format: text, or template with chat: false"],
            )


def check(prepared: Prepared, recipe: Recipe, split: Split, rejects: str) -> None:
    """Refuse data that is empty, or of which too little is left.

    Args:
        rejects: where the reader finds the rejects.

    Raises:
        DataError: no row, no usable row, or more rejects than `data.max_bad_rows`.
    """
    counts = prepared.counts
    ways = [f"each reject with file, line and reason: {rejects}"]
    if not counts.rows:
        raise DataError(f"data.{split} is empty: its files hold no rows", ["check that the right files are named"])
    if not counts.used:
        raise DataError(
            f"data.{split}: all {counts.rows} rows were rejected: {'; '.join(counts.common_reasons())}",
            [*ways, "check the source's format and its *_field settings"],
        )
    if counts.bad_share > recipe.data.max_bad_rows:
        raise DataError(
            f"data.{split}: {counts.bad_share:.1%} of {counts.rows} rows are bad, more than data.max_bad_rows = "
            f"{recipe.data.max_bad_rows:.1%}; commonest: {'; '.join(counts.common_reasons())}",
            [*ways, "mend the rows", f"or accept them: data.max_bad_rows={min(1.0, counts.bad_share + 0.005):.2f}"],
        )


# ------------------------------------------------------------------------------------------------------- the work


@lru_cache(maxsize=4)
def _tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Resolved once per process, not per chunk: a hub id asks the hub, a URI lists the storage."""
    return load_tokenizer(paths.model_folder(model, weights=False))


@dataclass(frozen=True)
class _Work:
    """What one chunk's work needs to know; travels to the task that does it."""

    location: str
    model_folder: str
    sources: tuple[AnySource, ...]
    seq_len: int
    packing: bool
    long_rows: str

    def __call__(self, item: tuple[int, Chunk]) -> dict[str, Any]:
        """Prepare one chunk: write its shard and its rejects, return what was counted."""
        number, chunk = item
        counts = Counts()
        shard = f"{number:06d}.parquet"
        last_line = 0
        tokenizer = _tokenizer_of(self.model_folder)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        rejects: list[dict[str, Any]] = []
        with _ShardWriter(paths.join(self.location, "shards", shard), self.seq_len) as writer:

            def flush() -> None:
                rows, members = pack(pending, self.seq_len, packing=self.packing, pad_id=pad_id)
                counts.tokens += int(np.count_nonzero(rows.flags & REAL))
                counts.trained_tokens += int(np.count_nonzero(rows.flags & TRAINED))
                counts.packed += len(rows)
                writer.write(rows, [[lines[i] for i in row] for row in members])
                pending.clear()
                lines.clear()

            pending: list[Tokens] = []
            lines: list[int] = []
            size = 0
            for line, result in self._samples(chunk, Renderer(tokenizer)):
                last_line = line
                if result is None:
                    continue
                counts.rows += 1
                if isinstance(result, Tokens):
                    counts.lengths[1 << max(len(result) - 1, 0).bit_length()] += 1
                    result, cut = self._fit(result)
                    counts.truncated += cut
                if isinstance(result, Reject):
                    counts.rejected[result.reason] += 1
                    rejects.append({"file": chunk.file.uri, "line": line, **asdict(result)})
                    continue
                counts.used += 1
                pending.append(result)
                lines.append(line)
                size += len(result)
                if size >= SEGMENT_TOKENS:
                    flush()
                    size = 0
            if pending:
                flush()
        return {
            "shard": shard,
            "groups": writer.groups,
            "counts": counts,
            "lines": 0 if chunk.file.kind == "parquet" else last_line,
            "rejects": rejects,
        }

    def _samples(self, chunk: Chunk, renderer: Renderer) -> Iterator[tuple[int, Tokens | Reject | None]]:
        """(line, tokens or why there are none) for every row of the chunk, in order; None for a blank line."""
        source = self.sources[chunk.source]
        waiting: list[tuple[int, Any]] = []

        def encoded() -> Iterator[tuple[int, Tokens | Reject | None]]:
            tokens = iter(renderer.encode([s for _, s in waiting if s is not None and not isinstance(s, Reject)]))
            for line, sample in waiting:
                yield line, sample if sample is None or isinstance(sample, Reject) else next(tokens)
            waiting.clear()

        for row in sources.read_rows(chunk, columns_used(source)):
            content = row.content
            waiting.append((row.line, to_sample(source, content) if isinstance(content, dict) else content))
            if len(waiting) == ENCODE_BATCH:
                yield from encoded()
        yield from encoded()

    def _fit(self, tokens: Tokens) -> tuple[Tokens | Reject, bool]:
        """The sample if it fits, cut or rejected as the recipe says; and whether it was cut."""
        cut = len(tokens) > self.seq_len
        if cut and self.long_rows == "drop":
            return Reject(TOO_LONG, f"{len(tokens)} tokens, data.seq_len is {self.seq_len}"), False
        if cut:
            tokens = Tokens(tokens.ids[: self.seq_len], tokens.trained[: self.seq_len])
        if not tokens.trained.any():
            detail = f"the answer begins after token {self.seq_len}" if cut else "no token of it is a target"
            return Reject("nothing to train on", detail), False
        return tokens, cut


class _ShardWriter:
    """A Parquet file of packed rows, one row group per write; appears under its name only when complete."""

    def __init__(self, location: str, seq_len: int) -> None:
        self.groups: list[int] = []
        self._location, self._seq_len = location, seq_len
        self._partial = paths.add_suffix(location, f".{uuid.uuid4().hex[:8]}.partial")
        self._schema = pa.schema(
            [
                ("input_ids", pa.list_(pa.int32(), seq_len)),
                ("flags", pa.list_(pa.uint8(), seq_len)),
                ("lines", pa.list_(pa.int64())),
            ]
        )

    def __enter__(self) -> _ShardWriter:
        fs, path = paths.filesystem(self._partial)
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        self._stream = fs.open_output_stream(path, compression=None)
        # Token ids compress three- to fourfold; level 1 costs less time than it saves in reading.
        self._writer = pq.ParquetWriter(self._stream, self._schema, compression="zstd", compression_level=1)
        return self

    def write(self, rows: Rows, lines: list[list[int]]) -> None:
        """One row group; `lines` are those of the samples in each row, within the chunk."""
        arrays: list[pa.Array] = [
            pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), self._seq_len)
            for matrix in (rows.input_ids, rows.flags)
        ]
        arrays.append(pa.array(lines, type=self._schema.field("lines").type))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(rows))
        self.groups.append(len(rows))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        self._stream.close()
        if kind is None:
            paths.move(self._partial, self._location)
        else:
            fs, path = paths.filesystem(self._partial)
            fs.delete_file(path)


def _matrix(column: pa.ChunkedArray, seq_len: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, seq_len)


def _run(work: _Work, chunks: list[Chunk], spread: Spread, on_progress: Callable[[int, int], None] | None) -> None:
    total, units, origins = Counts(), [], {}
    before = 0  # lines of the file that lie in its earlier chunks
    with paths.Appender(paths.join(work.location, "rejects.jsonl")) as rejects:
        results = spread(work, list(enumerate(chunks))) if chunks else ()
        for done, (chunk, result) in enumerate(zip(chunks, results, strict=True), start=1):
            before = before if chunk.start else 0  # two sources may read one file
            total.add(result["counts"])
            units += [asdict(Unit(result["shard"], group, rows)) for group, rows in enumerate(result["groups"])]
            origins[result["shard"]] = (chunk.file.uri, before)
            for reject in result["rejects"]:
                reject["line"] += before
                rejects.write(json.dumps(reject, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            before += result["lines"]
            if on_progress:
                on_progress(done, len(chunks))
    paths.write_json(
        paths.join(work.location, "stats.json"),
        {"format": FORMAT, "seq_len": work.seq_len, "counts": total.to_json(), "units": units, "origins": origins},
    )


def load(location: str, reused: bool = False) -> Prepared | None:
    """What was prepared at a location; None where nothing complete lies."""
    stats = paths.join(location, "stats.json")
    if not paths.exists(stats):
        return None
    content = paths.read_json(stats)
    units = tuple(Unit(**unit) for unit in content["units"])
    origins = {shard: (file, before) for shard, (file, before) in content["origins"].items()}
    return Prepared(location, content["seq_len"], Counts.from_json(content["counts"]), units, origins, reused)
