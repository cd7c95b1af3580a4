"""Packed rows of one split, ready to be read in any order, from storage or made again on the fly.

What is kept always is the index: which rows there are, where they come from, and what was counted. With
`data.cache: auto` the tokens lie beside it; without, `Prepared.segments` makes those of the units asked for again,
which gives the same rows bit by bit. Of images the files are kept, and what the model's tower is given is made of them
when rows are used (`Prepared.seen`), as it is a hundred times as large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np

from ray_ft import hub, paths
from ray_ft.data import shard
from ray_ft.data.counts import TOO_LONG, Counts
from ray_ft.data.pack import Rows, objects
from ray_ft.data.render import load_tokenizer
from ray_ft.data.shard import Segment
from ray_ft.data.vision import Vision, load_vision

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Unit:
    """Rows that were packed together: the smallest part that is read at once.

    `chunk` is its number among the chunks of all files, `group` the unit's among those of the chunk, `source` the
    number of the source that it belongs to, and `first` the line of the chunk at which its samples begin.
    """

    chunk: int
    group: int
    rows: int
    source: int = 0
    first: int = 1

    @property
    def shard(self) -> str:
        return shard_name(self.chunk)


class References(Protocol):
    """What a reference model says of pairs; `documents`: of how many in a row, at most."""

    @property
    def documents(self) -> int: ...

    def read(self, unit: Unit) -> np.ndarray:
        """float32 [rows, documents]: see `Rows.reference`."""


def shard_name(chunk: int) -> str:
    return f"{chunk:06d}.parquet"


@lru_cache(maxsize=4)
def vision_of(model: str) -> Vision:
    """Of a model's folder, URI or hub id; resolved once per process.

    Raises:
        ModelError: as of `vision.load_vision`.
    """
    folder = hub.model_folder(model, weights=False)
    return load_vision(folder, load_tokenizer(folder))


@dataclass(frozen=True)
class Origin:
    """Where the rows of a chunk come from: `before` counts the lines of its file that lie in earlier chunks."""

    file: str
    before: int


@dataclass(frozen=True)
class Loaded:
    """What was read of a unit; None for what was not asked for. `samples` names, for each row, its samples."""

    rows: Rows | None
    samples: list[tuple[str, ...]] | None


class Render(Protocol):
    """Makes units of one chunk again; `units` are in ascending order."""

    def read(self, number: int, units: Sequence[Unit]) -> Iterator[Segment]: ...


@dataclass(frozen=True)
class Prepared:
    """Packed rows of one split.

    `origins` are those of the chunks, by number. `render` makes rows where no tokens are stored; None: they are.
    `references` are read along with pairs; None: rows have none. `processor` is the model (folder, URI or hub id) whose
    processor prepares images; None: rows have none.
    """

    location: str
    seq_len: int
    counts: Counts
    units: tuple[Unit, ...]
    origins: tuple[Origin, ...]
    reused: bool = False
    render: Render | None = None
    references: References | None = None
    processor: str | None = None

    @property
    def images(self) -> bool:
        """Whether rows may have images."""
        return self.processor is not None

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

    @cached_property
    def rows_by_source(self) -> dict[int, int]:
        """Packed rows of each source that gave any."""
        found: dict[int, int] = {}
        for unit in self.units:
            found[unit.source] = found.get(unit.source, 0) + unit.rows
        return found

    def segments(self, units: Sequence[Unit], *, tokens: bool, samples: bool) -> Iterator[Loaded]:
        """What the units hold, one after the other; neighbours of one chunk are read in one pass over it.

        Raises:
            DataError: a file changed since it was prepared, where its rows have to be made again.
        """
        for unit, loaded in zip(units, self._segments(units, tokens=tokens, samples=samples), strict=True):
            if loaded.rows is None or self.references is None:
                yield loaded
            else:
                yield replace(loaded, rows=replace(loaded.rows, reference=self.references.read(unit)))

    def _segments(self, units: Sequence[Unit], *, tokens: bool, samples: bool) -> Iterator[Loaded]:
        for number, group in groupby(units, key=lambda unit: unit.chunk):
            wanted = list(group)
            if self.render is not None:
                for segment in self.render.read(number, wanted):
                    names = self._names(number, segment.lines) if samples else None
                    yield Loaded(segment.rows if tokens else None, names)
                continue
            location = paths.join(self.location, "shards", shard_name(number))
            groups = [unit.group for unit in wanted]
            for rows, lines in shard.read(
                location, groups, self.seq_len, tokens=tokens, lines=samples, images=self.images
            ):
                yield Loaded(rows, None if lines is None else self._names(number, lines))

    def blank(self, count: int) -> Rows:
        """Rows of padding as these are otherwise."""
        documents = self.references.documents if self.references else None
        return Rows.blank(count, self.seq_len, documents, images=self.images)

    def read(self, units: Sequence[Unit]) -> Rows:
        """The rows of some units, one after the other, in memory."""
        size = sum(unit.rows for unit in units)
        joined, at = self.blank(size), 0
        for loaded in self.segments(units, tokens=True, samples=False):
            assert loaded.rows is not None
            stop = at + len(loaded.rows)
            joined.put(slice(at, stop), loaded.rows)
            at = stop
        return joined

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each of a row's pixels, in a run with images."""
        assert self.processor is not None
        return vision_of(self.processor).shape

    def seen(self, rows: Rows) -> Rows:
        """The rows as the model takes them: with pixels in place of images. A few at a time: 10 MB an image."""
        if rows.images is None or self.processor is None:
            return rows
        eyes = vision_of(self.processor)
        return replace(rows, images=None, pixels=objects([eyes.pixels(files) for files in rows.images]))

    def names(self, unit: Unit, row: int) -> list[str]:
        """``file:line`` of the samples that share one packed row."""
        (loaded,) = self.segments([unit], tokens=False, samples=True)
        assert loaded.samples is not None
        return list(loaded.samples[row])

    def _names(self, chunk: int, lines: list[list[int]]) -> list[tuple[str, ...]]:
        origin = self.origins[chunk]
        return [tuple(f"{origin.file}:{origin.before + line}" for line in row) for row in lines]

    def summary(self) -> str:
        """What became of the rows, in a line."""
        c = self.counts
        long = c.rejected[TOO_LONG]
        parts = [f"{c.rows:,} rows", f"{c.rejected.total() - long:,} rejected"]
        parts += [f"{long:,} over {self.seq_len} tokens left out"] * bool(long) + [f"{c.truncated:,} cut"] * bool(
            c.truncated
        )
        parts += [f"{c.duplicates:,} duplicate row{'s' * (c.duplicates > 1)}, used"] * bool(c.duplicates)
        return ", ".join([*parts, f"{c.packed:,} packed rows, {self.non_pad_share:.1%} of them real tokens"])

    def stats(self) -> dict[str, Any]:
        """What `data/stats.json` of a run says."""
        return {
            "location": self.location,
            "seq_len": self.seq_len,
            "non_pad_share": round(self.non_pad_share, 4),
            "packed_by_source": {str(source): rows for source, rows in self.rows_by_source.items()},
            **self.counts.to_json(),
        }
