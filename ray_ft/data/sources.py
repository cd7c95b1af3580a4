"""Bytes to rows: find the files of a source, cut them into chunks, read the rows of one chunk.

Lines are read as bytes and parsed one by one, because the usual readers alter data silently: they turn long ids into
floats, ISO dates into datetimes and missing fields into nulls. Every row carries its file and its line. What becomes of
each kind of bad input is in docs/bad_data.md.

A chunk is the unit of work that Ray Data spreads over the cluster: a byte range of a JSONL file (a line belongs to the
chunk in which it begins), a whole compressed file, or a range of Parquet row groups. Chunks depend on the files alone,
so that what is made of them does not depend on the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray_ft.data.files import File, find_files, public_name
from ray_ft.data.lines import Reject, parse_line, read_lines
from ray_ft.data.parquet import parquet_columns, read_footers, read_groups, row_group_bytes

__all__ = [
    "find_files",
    "File",
    "public_name",
    "chunks_of",
    "Chunk",
    "read_rows",
    "Row",
    "Reject",
    "parquet_columns",
    "read_footers",
    "CHUNK_BYTES",
]

CHUNK_BYTES = 8 << 20  # about 2M tokens of text: large enough to pack well, small enough to hold in memory


@dataclass(frozen=True)
class Chunk:
    """Part of one file: bytes [start, stop) of a JSONL file, or Parquet row groups [start, stop)."""

    source: int
    file: File
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """One parsed row, why it could not be parsed, or None for a blank line.

    `line` counts from 1: lines within the chunk for JSONL (the chunks before it are not known here), rows within the
    file for Parquet.
    """

    line: int
    content: dict[str, Any] | Reject | None


def chunks_of(file: File, source: int, chunk_bytes: int | None = None) -> list[Chunk]:
    """Cut one file into chunks of about `chunk_bytes` (CHUNK_BYTES) bytes on disk; a compressed file stays whole.

    Raises:
        DataError: a Parquet file that does not open.
    """
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    if file.compression:
        return [Chunk(source, file, 0, file.size)]
    if file.kind == "jsonl":
        return [Chunk(source, file, at, min(at + chunk_bytes, file.size)) for at in range(0, file.size, chunk_bytes)]
    groups = row_group_bytes(file)
    chunks, start, size = [], 0, 0
    for group, group_bytes in enumerate(groups):
        size += group_bytes
        if size >= chunk_bytes or group == len(groups) - 1:
            chunks.append(Chunk(source, file, start, group + 1))
            start, size = group + 1, 0
    return chunks


def read_rows(chunk: Chunk, columns: set[str] | None = None) -> Iterator[Row]:
    """The rows of one chunk in file order.

    Args:
        columns: all that is read of a Parquet file; None: everything.

    Raises:
        DataError: the file as a whole is damaged, cut short, or not what its name says.
    """
    file = chunk.file
    if file.kind == "parquet":
        for number, content in read_groups(file, chunk.start, chunk.stop, columns):
            yield Row(number, content)
        return
    for number, line in enumerate(read_lines(file, chunk.start, chunk.stop), start=1):
        if isinstance(line, Reject):
            yield Row(number, line)
        else:
            yield Row(number, parse_line(line) if line.strip() else None)
