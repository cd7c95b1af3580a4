"""Packed rows of one chunk as a Parquet file: one row group per segment, written once, read group by group."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_ft import paths
from ray_ft.data.pack import Rows, objects


@dataclass(frozen=True)
class Segment:
    """Samples that were packed together.

    `lines` are, for each row, those of its samples, as `sources.read_rows` counts them within the chunk; `first` is the
    line of the chunk at which the segment begins.
    """

    rows: Rows
    lines: list[list[int]]
    first: int


class ShardWriter:
    """Writes the segments of one chunk; the file appears under its name only when complete."""

    def __init__(self, location: str, seq_len: int, images: bool = False) -> None:
        self._location, self._seq_len, self._images = location, seq_len, images
        self._partial = paths.add_suffix(location, f".{uuid.uuid4().hex[:8]}.partial")
        self._schema = pa.schema(
            [
                ("input_ids", pa.list_(pa.int32(), seq_len)),
                ("flags", pa.list_(pa.uint8(), seq_len)),
                ("lines", pa.list_(pa.int64())),
                *([("images", pa.list_(pa.binary()))] if images else []),
            ]
        )

    def __enter__(self) -> ShardWriter:
        fs, path = paths.filesystem(self._partial)
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        self._stream = fs.open_output_stream(path, compression=None)
        # Token ids compress two- to fourfold; level 1 costs less time than it saves in reading. Their bytes one beside
        # the other, as the upper two say little, are smaller than a dictionary of them, and written twice as fast.
        self._writer = pq.ParquetWriter(
            self._stream, self._schema, compression="zstd", compression_level=1, use_dictionary=False,
            column_encoding={"input_ids.list.element": "BYTE_STREAM_SPLIT"}, write_statistics=False,
        )  # fmt: skip
        return self

    def write(self, segment: Segment) -> None:
        """One row group."""
        rows = segment.rows
        arrays: list[pa.Array] = [
            pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), self._seq_len)
            for matrix in (rows.input_ids, rows.flags)
        ]
        arrays.append(pa.array(segment.lines, type=self._schema.field("lines").type))
        if self._images:
            assert rows.images is not None
            arrays.append(pa.array([list(files) for files in rows.images], type=self._schema.field("images").type))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(rows))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        self._stream.close()
        if kind is None:
            paths.move(self._partial, self._location)
        else:
            fs, path = paths.filesystem(self._partial)
            fs.delete_file(path)


def read(
    location: str, groups: Sequence[int], seq_len: int, *, tokens: bool, lines: bool, images: bool = False
) -> Iterator[tuple[Rows | None, list[list[int]] | None]]:
    """(rows, lines of their samples) of some row groups, one after the other; None for what is not asked for.

    Args:
        images: whether rows have a column of images.
    """
    fs, path = paths.filesystem(location)
    columns = (["input_ids", "flags"] + ["images"] * images) * tokens + ["lines"] * lines
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        for group in groups:
            table = file.read_row_group(group, columns=columns)
            rows = _rows(table, seq_len, images) if tokens else None
            yield rows, table.column("lines").to_pylist() if lines else None


def _rows(table: pa.Table, seq_len: int, images: bool) -> Rows:
    ids, flags = (_matrix(table.column(name), seq_len) for name in ("input_ids", "flags"))
    files = objects([tuple(row) for row in table.column("images").to_pylist()]) if images else None
    return Rows(ids, flags, images=files)


def _matrix(column: pa.ChunkedArray, seq_len: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, seq_len)
