"""Lines of a JSONL file, plain or compressed, as bytes, and the JSON object in one line, exactly as written.

A file that cannot be read as lines at all is an error with its name: as one bad row it would pass for a small loss.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from ray_ft import paths
from ray_ft.data import foreign
from ray_ft.data.files import File
from ray_ft.errors import DataError

MAX_LINE_BYTES = 64 << 20  # a longer line is no training row but a file without line ends
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Reject:
    """Why a row is not used. `reason` is the kind of fault (counted), `detail` the particular (reported)."""

    reason: str
    detail: str = ""


def parse_line(line: bytes) -> dict[str, Any] | Reject:
    """One JSON object, exactly as written: integers of any length, strings untouched."""
    if b"\0" in line:
        count = line.count(b"\0")
        return Reject("NUL byte", f"{count} of them, the first at byte {line.index(0)} of the line")
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
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(f"{key[:80]!r} stands twice")
            seen.add(key)
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _type_name(value: Any) -> str:
    return {type(None): "null", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")


# ---------------------------------------------------------------------------------------------------------- reading


def read_lines(file: File, start: int, stop: int) -> Iterator[bytes | Reject]:
    """Lines that begin in bytes [start, stop), without their line ends; a Reject in place of one that is too long.

    Raises:
        DataError: a file that has changed since it was listed, that is something else than lines of UTF-8 text, or a
            compressed one that breaks off or is damaged.
    """
    fs, path = paths.filesystem(file.uri)
    with fs.open_input_file(path) as raw:
        if (size := raw.size()) != file.size:
            raise DataError(
                f"{file.name} has {size} bytes and had {file.size} when it was listed: it changes while it is read",
                ["wait until it is written whole, and start again"],
            )
        yield from _compressed_lines(file, raw) if file.compression else _plain_lines(file, raw, start, stop)


def _plain_lines(file: File, raw: pa.NativeFile, start: int, stop: int) -> Iterator[bytes | Reject]:
    position = start
    if start:  # a line that began before this byte belongs to the chunk before
        raw.seek(start - 1)
    reader = io.BufferedReader(_Raw(raw), buffer_size=BUFFER_BYTES)
    if start:
        passed = reader.readline(stop - start)  # no further: were the file one line, each chunk would read it all
        if not passed.endswith(b"\n"):
            return
        position += len(passed) - 1
    else:
        foreign.check_text(file, reader.peek(foreign.HEAD_BYTES)[: foreign.HEAD_BYTES])
    if position >= stop:
        return
    for length, line in _split(reader, file if position == 0 else None):
        yield _without_bom(line) if position == 0 else line
        position += length
        if position >= stop:
            return


def _compressed_lines(file: File, raw: pa.NativeFile) -> Iterator[bytes | Reject]:
    assert file.compression
    number = 0
    try:
        if not file.size:  # nothing, compressed, is some bytes
            raise EOFError("the file is empty")
        foreign.check_compression(file, raw.read(16))
        raw.seek(0)
        foreign.check_text(file, _head(_decompress(raw, file.compression)))
        raw.seek(0)
        for _, line in _split(_decompress(raw, file.compression), file):
            yield line if number else _without_bom(line)
            number += 1
    except _corrupt_stream() as error:
        # Not a reject: it would count as one bad row, however many the lost rest held.
        raise DataError(
            f"{file.name} ({file.size} bytes) is not a readable {file.compression} file: it breaks after line "
            f"{number}: {error}",
            ["copy it again, if the original is whole", "write it again, or take it out of data.train / data.eval"],
        ) from error


def _split(reader: IO[bytes], first_of: File | None) -> Iterator[tuple[int, bytes | Reject]]:
    """(bytes passed, line) for each line, in bounded memory.

    Args:
        first_of: the file whose first line comes first; None within a file.
    """
    while line := reader.readline(MAX_LINE_BYTES):
        length = len(line)
        if length < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield length, line.rstrip(b"\r\n")
            first_of = None
            continue
        if first_of:
            raise DataError(
                f"{first_of.name} ({first_of.size} bytes) holds no line end in its first {length} bytes, so it is not "
                "JSON lines: one object per line",
                ["write each row on a line of its own", "or take it out of data.train / data.eval"],
            )
        while line and not line.endswith(b"\n"):
            line = reader.readline(MAX_LINE_BYTES)
            length += len(line)
        yield length, Reject("line too long", f"{length} bytes, over {MAX_LINE_BYTES >> 20} MiB; are there line ends?")


def _without_bom(line: bytes | Reject) -> bytes | Reject:
    return line.removeprefix(codecs.BOM_UTF8) if isinstance(line, bytes) else line


# ------------------------------------------------------------------------------------------------------ compression


def _corrupt_stream() -> tuple[type[Exception], ...]:
    import zstandard

    # Not OSError as a whole: a storage that fails to answer is no fault of the data.
    return gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError


def _head(reader: IO[bytes]) -> bytes:
    """How the content begins, as far as it can be read; what damages the rest is said when it is read."""
    head = b""
    try:
        while len(head) < foreign.HEAD_BYTES and (block := reader.read1(foreign.HEAD_BYTES - len(head))):  # type: ignore[attr-defined]
            head += block
    except _corrupt_stream():
        return b""
    return head


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
