"""Bytes to rows: find the files of a source, cut them into chunks, read the rows of one chunk.

Lines are read as bytes and parsed one by one, because the usual readers alter data silently: they turn long ids into
floats, ISO dates into datetimes and missing fields into nulls. Every row carries its file and its line.

A chunk is the unit of work that Ray Data spreads over the cluster: a byte range of a JSONL file (a line belongs to the
chunk in which it begins), a whole compressed file, or a range of Parquet row groups. Chunks depend on the files alone,
so that what is made of them does not depend on the cluster.
"""

from __future__ import annotations

import codecs
import fnmatch
import gzip
import io
import json
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_ft import paths
from ray_ft.errors import DataError, StorageError
from ray_ft.recipe import Source

CHUNK_BYTES = 8 << 20  # about 2M tokens of text: large enough to pack well, small enough to hold in memory
MAX_LINE_BYTES = 64 << 20  # a longer line is no training row but a file without line ends
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class File:
    """One input file. `stamp` identifies its content as far as a listing can: size in bytes and time of change."""

    uri: str
    kind: Literal["jsonl", "parquet"]
    compression: str | None
    size: int
    stamp: str


@dataclass(frozen=True)
class Chunk:
    """Part of one file: bytes [start, stop) of a JSONL file, or Parquet row groups [start, stop)."""

    source: int
    file: File
    start: int
    stop: int


@dataclass(frozen=True)
class Reject:
    """Why a row is not used. `reason` is the kind of fault (counted), `detail` the particular (reported)."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One parsed row, why it could not be parsed, or None for a blank line.

    `line` counts from 1: lines within the chunk for JSONL (the chunks before it are not known here), rows within the
    file for Parquet.
    """

    line: int
    content: dict[str, Any] | Reject | None


# ---------------------------------------------------------------------------------------------------------- finding


def find_files(source: Source) -> list[File]:
    """The files of a source, sorted by name within each of its paths.

    Raises:
        DataError: a path matches nothing, a file is of no known kind or size, or two paths name the same one.
    """
    files: list[File] = []
    for location in source.path:
        found = _match(location)
        if not found:
            raise DataError(
                f"data path {location!r} matches no file",
                [
                    "check the path; a relative one starts at the folder the command runs in",
                    f"files must end in {', '.join(JSONL_SUFFIXES)} (also .gz, .zst) or .parquet",
                ],
            )
        files += found
    if twice := [uri for uri, count in Counter(file.uri for file in files).items() if count > 1]:
        raise DataError(
            f"{twice[0]} is named twice by the paths of one source, so its rows would count double",
            ["narrow the globs"],
        )
    return files


def _match(location: str) -> list[File]:
    base, pattern, query = _split_glob(location)
    local = not paths.is_uri(location) or location.startswith("file://")
    try:
        fs, path = paths.filesystem(base + query)
        # pyarrow's own filesystems undo the percent signs of a URI; fsspec takes it literally.
        escaped = paths.is_uri(location) and not isinstance(fs, pafs.PyFileSystem)

        def inner(info: pafs.FileInfo) -> str:
            return info.path.removeprefix(path).lstrip("/")

        if pattern:
            wanted = unquote(pattern) if escaped else pattern
            infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
            infos = [i for i in infos if _glob_match(inner(i), wanted)]
        else:
            info = fs.get_file_info(path)
            if info.type == pafs.FileType.File:
                return [_file(info.path if local else location, base, info)]
            infos = []
            if info.type == pafs.FileType.Directory:
                infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
                infos = [i for i in infos if _kind(i.path)[0] and not _hidden(inner(i))]
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"cannot list data path {location!r}: {error}", ["check the URI and its credentials"]
        ) from error
    files = []
    for info in sorted((i for i in infos if i.type == pafs.FileType.File), key=lambda i: i.path):
        name = quote(inner(info), safe="/!$&'()+,;=:@") if escaped else inner(info)
        # A path that the filesystem reports lacks host, credentials and query: only with these can any node open it.
        files.append(_file(info.path if local else paths.join(base + query, name), info.path, info))
    return files


def _file(uri: str, name: str, info: pafs.FileInfo) -> File:
    kind, compression = _kind(name)
    if kind is None:
        raise DataError(
            f"{uri} is of no known kind",
            [f"name it {', '.join(JSONL_SUFFIXES)} (also .gz, .zst) or .parquet", "narrow the glob"],
        )
    if info.size is None:  # it would pass for an empty file
        raise DataError(f"the size of {uri} is not known: its server does not say it", ["copy it to another storage"])
    return File(uri, kind, compression, info.size, f"{info.size}-{info.mtime_ns}")


def _split_glob(location: str) -> tuple[str, str, str]:
    """(folder, pattern below it, query of the URI); without a glob sign, the location is all in the first."""
    head, query = paths.split_query(location)
    root = head[: head.index("://") + 3] if paths.is_uri(head) else ""
    if head.startswith("/", len(root)):
        root += "/"
    parts = head[len(root) :].split("/")
    first = next((n for n, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return root + "/".join(parts[:first]), "/".join(parts[first:]), query


def _glob_match(path: str, pattern: str) -> bool:
    """Like a shell: * stays within one folder, ** crosses folders, neither meets a leading dot."""

    def match(parts: list[str], wanted: list[str]) -> bool:
        if not wanted:
            return not parts
        if wanted[0] == "**" and match(parts, wanted[1:]):
            return True
        if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
            return False
        if wanted[0] == "**":
            return match(parts[1:], wanted)
        return fnmatch.fnmatchcase(parts[0], wanted[0]) and match(parts[1:], wanted[1:])

    return match(path.split("/"), pattern.split("/"))


def _hidden(inner: str) -> bool:
    """Below a folder: what tools keep for themselves (.ipynb_checkpoints/, _delta_log/, ._x.jsonl)."""
    return any(part.startswith((".", "_")) for part in inner.split("/"))


def _kind(path: str) -> tuple[Literal["jsonl", "parquet"] | None, str | None]:
    stem, suffix = posixpath.splitext(path)
    if suffix == ".parquet":
        return "parquet", None
    if suffix in COMPRESSIONS and posixpath.splitext(stem)[1] in JSONL_SUFFIXES:
        return "jsonl", COMPRESSIONS[suffix]
    return ("jsonl", None) if suffix in JSONL_SUFFIXES else (None, None)


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
    metadata = _open_parquet(file).metadata
    chunks, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= chunk_bytes or group == metadata.num_row_groups - 1:
            chunks.append(Chunk(source, file, start, group + 1))
            start, size = group + 1, 0
    return chunks


# ---------------------------------------------------------------------------------------------------------- reading


def read_rows(chunk: Chunk, columns: set[str] | None = None) -> Iterator[Row]:
    """The rows of one chunk in file order.

    Args:
        columns: all that is read of a Parquet file; None: everything.

    Raises:
        DataError: a Parquet or compressed file is damaged or cut short.
    """
    if chunk.file.kind == "parquet":
        yield from _parquet_rows(chunk, columns)
        return
    for number, line in enumerate(_lines(chunk), start=1):
        if isinstance(line, Reject):
            yield Row(number, line)
        else:
            yield Row(number, parse_line(line) if line.strip() else None)


def parse_line(line: bytes) -> dict[str, Any] | Reject:
    """One JSON object, exactly as written: integers of any length, strings untouched."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject("invalid UTF-8", f"at byte {error.start} of the line")
    try:
        content = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        return Reject("invalid JSON", "nested too deeply")
    except ValueError as error:
        reason = "duplicate key" if isinstance(error, _DuplicateKeyError) else "invalid JSON"
        return Reject(reason, str(error))
    if not isinstance(content, dict):
        return Reject("not a JSON object", f"the line is {_type_name(content)}")
    return content


class _DuplicateKeyError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _type_name(value: Any) -> str:
    return {type(None): "null", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def _lines(chunk: Chunk) -> Iterator[bytes | Reject]:
    """Lines that begin in the chunk, without their line ends; a Reject in place of one that cannot be read.

    Raises:
        DataError: a compressed file that breaks off or is damaged.
    """
    fs, path = paths.filesystem(chunk.file.uri)
    with fs.open_input_file(path) as raw:
        if chunk.file.compression:
            number = 0
            try:
                if not chunk.file.size:  # nothing, compressed, is some bytes
                    raise EOFError("the file is empty")
                for _, line in _split(_decompress(raw, chunk.file.compression)):
                    yield line if number else _without_bom(line)
                    number += 1
            except _corrupt_stream() as error:
                # Not a reject: it would count as one bad row, however many the lost rest held.
                raise _broken(chunk.file, number, error) from error
            return
        position = chunk.start
        reader = io.BufferedReader(_Raw(raw), buffer_size=1 << 20)
        if position:  # a line that began before this byte belongs to the chunk before
            raw.seek(position - 1)
            position += next((length for length, _ in _split(reader)), 1) - 1
        if position < chunk.stop:
            for length, line in _split(reader):
                yield _without_bom(line) if position == 0 else line
                position += length
                if position >= chunk.stop:
                    return


def _split(reader: IO[bytes]) -> Iterator[tuple[int, bytes | Reject]]:
    """(bytes passed, line) for each line, in bounded memory."""
    while line := reader.readline(MAX_LINE_BYTES):
        length = len(line)
        if length < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield length, line.rstrip(b"\r\n")
            continue
        while line and not line.endswith(b"\n"):
            line = reader.readline(MAX_LINE_BYTES)
            length += len(line)
        yield length, Reject("line too long", f"{length} bytes, over {MAX_LINE_BYTES >> 20} MiB; are there line ends?")


def _without_bom(line: bytes | Reject) -> bytes | Reject:
    return line.removeprefix(codecs.BOM_UTF8) if isinstance(line, bytes) else line


def _broken(file: File, line: int, error: Exception) -> DataError:
    return DataError(
        f"{file.uri} ({file.size} bytes) is not a readable {file.compression} file: it breaks after line {line}: "
        f"{error}",
        ["copy it again, if the original is whole", "write it again, or take it out of data.train / data.eval"],
    )


def _corrupt_stream() -> tuple[type[Exception], ...]:
    import zstandard

    # Not OSError as a whole: a storage that fails to answer is no fault of the data.
    return gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError


def _decompress(raw: Any, compression: str) -> IO[bytes]:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=io.BufferedReader(_Raw(raw), buffer_size=1 << 20))  # type: ignore[return-value]
    return io.BufferedReader(_Zstd(raw), buffer_size=1 << 20)


class _Raw(io.RawIOBase):
    """A pyarrow file as Python raw IO, which buffered readers want; closing is left to the owner."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, decompressed; a file cut short is an EOFError, where `stream_reader` just ends."""

    BLOCK = 16 << 10  # bytes decompressed at once: what they grow to is held in memory

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._plain:
            self._compressed = self._compressed or self._file.read(self.BLOCK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        block, self._plain = self._plain[: len(buffer)], self._plain[len(buffer) :]
        buffer[: len(block)] = block
        return len(block)


def _open_parquet(file: File) -> pq.ParquetFile:
    fs, path = paths.filesystem(file.uri)
    try:
        return pq.ParquetFile(fs.open_input_file(path))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: File, error: Exception) -> DataError:
    return DataError(
        f"{file.uri} ({file.size} bytes) is not a readable Parquet file: {error}",
        ["write it again, or take it out of data.train / data.eval"],
    )


def parquet_columns(file: File) -> list[str]:
    return _open_parquet(file).schema_arrow.names


def _parquet_rows(chunk: Chunk, columns: set[str] | None) -> Iterator[Row]:
    parquet = _open_parquet(chunk.file)
    line = sum(parquet.metadata.row_group(g).num_rows for g in range(chunk.start))
    wanted = None if columns is None else sorted(columns)
    batches = parquet.iter_batches(batch_size=1024, row_groups=list(range(chunk.start, chunk.stop)), columns=wanted)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(chunk.file, error) from error
        if batch is None:
            return
        for content in batch.to_pylist():
            line += 1
            yield Row(line, content)
