"""Rows of a Parquet file, with the values that stand in it: each file by its own schema, nothing cast or filled in."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_ft import paths
from ray_ft.data.files import File
from ray_ft.data.lines import Reject
from ray_ft.errors import DataError

OPENED_AT_ONCE = 16  # footers that are waited for together: of an object store each takes tens of milliseconds


def parquet_columns(file: File) -> list[str]:
    """Names of the columns.

    Raises:
        DataError: the file does not open.
    """
    return list(_footer(file)[0])


def row_group_bytes(file: File) -> list[int]:
    """Size of each row group, uncompressed.

    Raises:
        DataError: the file does not open.
    """
    return list(_footer(file)[1])


def read_footers(files: Iterable[File]) -> None:
    """Have what the two above say of many files, several at once. One that does not open is left to them to say."""

    def read(file: File) -> None:
        with contextlib.suppress(DataError):
            _footer(file)

    wanted = [file for file in files if file.kind == "parquet"]
    if len(wanted) > 1:
        with ThreadPoolExecutor(min(OPENED_AT_ONCE, len(wanted)), thread_name_prefix="footers") as pool:
            list(pool.map(read, wanted))


@lru_cache(maxsize=1 << 16)
def _footer(file: File) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(names of the columns, bytes of the row groups) of a file, which is opened once for both."""
    parquet = _open(file)
    metadata = parquet.metadata
    sizes = (metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return tuple(parquet.schema_arrow.names), tuple(sizes)


def read_groups(
    file: File, start: int, stop: int, columns: set[str] | None
) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """(number in the file from 1, row) of the row groups [start, stop); `columns` None: all of them.

    Raises:
        DataError: the file is damaged, or two of its columns bear one wanted name.
    """
    parquet = _open(file)
    names = Counter(parquet.schema_arrow.names)
    if twice := sorted(name for name in columns or names if names[name] > 1):
        raise DataError(
            f"{file.name} has {names[twice[0]]} columns of the name {twice[0]!r}: which is meant cannot be known",
            ["write it again with distinct names, or take it out of data.train / data.eval"],
        )
    number, last = (sum(parquet.metadata.row_group(group).num_rows for group in range(end)) for end in (start, stop))
    wanted = None if columns is None else sorted(columns)
    batches = parquet.iter_batches(batch_size=1024, row_groups=list(range(start, stop)), columns=wanted)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error
        if batch is None:
            break
        for content in _rows(batch):
            number += 1
            yield number, content
    if number != last:
        raise _unreadable(file, f"row groups {start} to {stop - 1} end at row {number}, not {last}")


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Reject]:
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # invalid UTF-8, a date beyond Python's: find the rows
        pass
    for at in range(len(batch)):
        content: dict[str, Any] | Reject = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                content[name] = column[at].as_py()  # type: ignore[index]
            except UnicodeDecodeError as error:
                content = Reject("invalid UTF-8", f"at byte {error.start} of column {name!r}")
                break
            except (ValueError, OverflowError) as error:
                content = Reject("a value that Python cannot hold", f"in column {name!r}: {error}")
                break
        yield content


def _open(file: File) -> pq.ParquetFile:
    fs, path = paths.filesystem(file.uri)
    try:
        # Without checksums, which a file may leave out, a wrong byte in a page is another text, and nobody knows.
        parquet = pq.ParquetFile(fs.open_input_file(path), page_checksum_verification=True)
        parquet.schema_arrow  # noqa: B018 - its names are decoded here
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error
    metadata = parquet.metadata
    rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if rows != metadata.num_rows:  # the footer has no checksum
        raise _unreadable(file, f"its footer promises {metadata.num_rows} rows, its row groups {rows}")
    return parquet


def _unreadable(file: File, error: Exception | str) -> DataError:
    return DataError(
        f"{file.name} ({file.size} bytes) is not a readable Parquet file: {error}",
        [
            "copy it again, if the original is whole: a file that was cut short has lost the footer at its end",
            "give it the name of what it is, if it is JSON lines",
            "write it again, or take it out of data.train / data.eval",
        ],
    )
