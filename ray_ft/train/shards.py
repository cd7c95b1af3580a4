"""Spans in files: one safetensors file for each worker, on any filesystem, read again in any other cut.

A checkpoint's folder holds ``shard_00000.safetensors`` and so on, in which each tensor is one dimension long: the run
of the flattened whole that this worker owned. ``index.json`` says which file holds which run of which tensor, and has a
checksum of each file's header and of each block of each run. Whoever reads asks for the runs that it wants and reads
the blocks with those bytes alone, so neither the strategy nor the number of workers that wrote matters; each block is
checked before any of it is used. Nothing is pickled, and memory holds one block at a time.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow.fs as pafs
import torch

from ray_ft import collector, paths
from ray_ft.errors import CheckpointError
from ray_ft.retry import patiently
from ray_ft.span import Span

INDEX = "index.json"

#: Bytes of a run that have one checksum, and that are copied at once.
BLOCK = 1 << 24
#: Blocks after which a writer waits until they have left: an S3 stream would else hold all that its uploads lag behind.
IN_FLIGHT = 8

#: Of the standard library's checksums the fastest on one core of the machine that this was measured on, in GB/s:
#: crc32 4.2, adler32 3.6, sha1 1.9, sha256 1.8, blake2b 0.9, md5 0.8; a copy in memory takes 12. It is there against
#: decay, not forgery: 1 damaged block in 4 billion goes unseen. It releases the GIL.
checksum = zlib.crc32

#: Names of element types in the safetensors format.
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
DTYPES = {code: dtype for dtype, code in CODES.items()}


class Damaged(CheckpointError):
    """Bytes of a checkpoint are not those that were written, or not there.

    Attributes:
        file: its name in the checkpoint's folder.
        tensor: whose values they are; None in what is no tensor's.
        offset: of the first byte of the block in the file; None where the whole file is meant.
    """

    def __init__(
        self,
        what: str,
        ways_out: Sequence[str] = (),
        file: str = "",
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(what, ways_out)
        self.file, self.tensor, self.offset = file, tensor, offset
        self.args = (what, self.ways_out, file, tensor, offset)  # what pickling gives to __init__ again


class Stopped(Exception):
    """Writing was given up because nobody wants the file any more."""


@dataclass(frozen=True)
class Run:
    """The elements [start, stop) of a tensor in one file.

    Attributes:
        header: bytes of the file's header, its length included, and their checksum.
        block: bytes that have one checksum; the last block of a run may be shorter.
        checksums: of the blocks, in order.
    """

    file: str
    start: int
    stop: int
    header: tuple[int, int]
    block: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its whole shape, and its runs.

    An index has a run for each tensor and worker, of which one that reads wants its own few: they are made when they
    are asked for. `pieces`, `files` and `block` are as ``index.json`` has them, the pieces in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[tuple[str, int, int, list[int]]]
    files: Mapping[str, Any]
    block: int

    @property
    def runs(self) -> tuple[Run, ...]:
        """All of them, in order."""
        return tuple(map(self._run, self.pieces))

    def between(self, low: int, high: int) -> Iterator[Run]:
        """Those that hold any of the elements [low, high), in order."""
        for at in range(bisect_right(self.pieces, low, key=lambda piece: piece[2]), len(self.pieces)):
            if self.pieces[at][1] >= high:
                return
            yield self._run(self.pieces[at])

    def _run(self, piece: tuple[str, int, int, list[int]]) -> Run:
        file, start, stop, checksums = piece
        size, header = self.files[file]["header"]
        return Run(file, start, stop, (size, header), self.block, tuple(checksums))


class Written(TypedDict):
    """What one worker wrote, as JSON has it.

    `header` is (bytes, checksum); `tensors`: name → (start, stop, shape, element type, checksums of the blocks).
    """

    file: str
    bytes: int
    header: tuple[int, int]
    tensors: dict[str, tuple[int, int, tuple[int, ...], str, list[int]]]


def file_name(rank: int) -> str:
    return f"shard_{rank:05d}.safetensors"


def owned(spans: Mapping[str, Span]) -> dict[str, Span]:
    """What this worker writes, in the order of its file: wide elements first, so that all are aligned."""
    mine = {name: span for name, span in spans.items() if span.owner and span.data.numel()}
    return dict(sorted(mine.items(), key=lambda item: (-item[1].data.element_size(), item[0])))


def write(folder: str, rank: int, spans: Mapping[str, Span], stopped: Callable[[], bool] = lambda: False) -> Written:
    """Write what this worker owns of `spans` into its file.

    Args:
        stopped: asked before each block.

    Raises:
        Stopped: it said so; what is there of the file is to be deleted.
        OSError: storage failed; the file may be there in part.
    """
    mine = owned(spans)
    header: dict[str, Any] = {}
    offset = 0
    for name, span in mine.items():
        size = span.data.numel() * span.data.element_size()
        header[name] = {
            "dtype": CODES[span.data.dtype],
            "shape": [span.data.numel()],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    text = struct.pack("<Q", len(text)) + text
    location = paths.join(folder, file_name(rank))
    fs, path = paths.filesystem(location)
    fs.create_dir(os.path.dirname(path), recursive=True)
    checksums: dict[str, list[int]] = {name: [] for name in mine}
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(text)
        for number, (name, block) in enumerate(_blocks(mine)):
            if stopped():
                raise Stopped
            content = block.contiguous().view(torch.uint8).numpy()
            checksums[name].append(checksum(content))
            stream.write(content)
            if number % IN_FLIGHT == IN_FLIGHT - 1:
                stream.flush()
    if isinstance(fs, pafs.LocalFileSystem):
        _flush_to_disk(path)
    return {
        "file": file_name(rank),
        "bytes": len(text) + offset,
        "header": (len(text), checksum(text)),
        "tensors": {
            name: (span.start, span.stop, span.shape, CODES[span.data.dtype], checksums[name])
            for name, span in mine.items()
        },
    }


def _blocks(spans: Mapping[str, Span]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, span in spans.items():
        size = BLOCK // span.data.element_size()
        for start in range(0, span.data.numel(), size):
            yield name, span.data[start : start + size].detach().cpu()


def _flush_to_disk(path: str) -> None:
    # A machine that loses power must not leave a committed checkpoint whose bytes never left its memory.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@collector.paused()
def index_of(written: Iterable[Written]) -> bytes:
    """``index.json``: where everything is, from what all workers wrote.

    Raises:
        CheckpointError: the runs of a tensor do not make up the whole.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for part in written:
        files[part["file"]] = {"bytes": part["bytes"], "header": part["header"]}
        for name, (start, stop, shape, code, checksums) in part["tensors"].items():
            entry = tensors.setdefault(name, {"shape": list(shape), "dtype": code, "runs": []})
            entry["runs"].append([part["file"], start, stop, checksums])
    for name, entry in tensors.items():
        entry["runs"].sort(key=lambda run: run[1])
        at, numel = 0, Span(torch.empty(0), 0, tuple(entry["shape"])).numel
        for _, start, stop, _ in entry["runs"]:
            if start != at:
                break
            at = stop
        if at != numel:
            raise CheckpointError(
                f"the workers' pieces of {name} do not make up its {numel} elements: "
                f"{[run[:3] for run in entry['runs'][:4]]}",
                ["report this with the recipe; it should not happen"],
            )
    return json.dumps({"block": BLOCK, "files": files, "tensors": tensors}).encode()


@collector.paused()
def parse_index(text: bytes) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, from its ``index.json``."""
    index = json.loads(text)
    return {
        name: Stored(tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["runs"], index["files"], index["block"])
        for name, entry in index["tensors"].items()
    }


def read_index(folder: str) -> dict[str, Stored]:
    """`parse_index` of a folder's, unchecked; of a checkpoint, take `checkpoint.index`."""
    return parse_index(paths.read_bytes(paths.join(folder, INDEX)))


def read(folder: str, index: Mapping[str, Stored], spans: Mapping[str, Span]) -> None:
    """Fill spans in place, whatever cut they were written in; values are converted to each span's element type.

    Raises:
        Damaged: bytes are missing or are not those that were written. Spans may be filled in part.
        OSError: storage failed, after several attempts.
    """
    wanted: dict[str, list[tuple[str, Run]]] = {}
    for name, span in spans.items():
        if span.start < span.stop:
            for run in index[name].between(span.start, span.stop):
                wanted.setdefault(run.file, []).append((name, run))
    for file, runs in sorted(wanted.items()):
        reader = _Reader(folder, file)
        with reader:
            size, expected = runs[0][1].header
            header = json.loads(reader.read(0, size, expected, None)[8:])
            for name, run in runs:
                begins = size + header[name]["data_offsets"][0]
                _fill(spans[name], reader, name, run, index[name].dtype, begins)


def _fill(span: Span, reader: _Reader, name: str, run: Run, dtype: torch.dtype, begins: int) -> None:
    """Fill a span with what one run has of it; `begins` is where the run does, in its file."""
    low, high = max(run.start, span.start), min(run.stop, span.stop)
    step = run.block // dtype.itemsize
    for number in range((low - run.start) // step, -(-(high - run.start) // step)):
        start = run.start + number * step
        stop = min(start + step, run.stop)
        raw = reader.read(begins + number * run.block, (stop - start) * dtype.itemsize, run.checksums[number], name)
        values = torch.frombuffer(raw, dtype=dtype)
        first, last = max(start, low), min(stop, high)
        span.data[first - span.start : last - span.start].copy_(values[first - start : last - start])


class _Reader:
    """Blocks of one file, each checked."""

    def __init__(self, folder: str, file: str) -> None:
        self._folder, self._file = folder, file
        fs, path = paths.filesystem(paths.join(folder, file))
        try:
            self._stream = patiently(lambda: fs.open_input_file(path))
        except FileNotFoundError:
            raise self._damaged("is missing", None, None) from None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, offset: int, size: int, expected: int, tensor: str | None) -> bytearray:
        for _ in range(2):  # a second time before it is called damaged: a bit may have tipped on the way here
            raw = bytearray(patiently(lambda: self._stream.read_at(size, offset)))
            if len(raw) == size and checksum(raw) == expected:
                return raw
        if len(raw) < size:
            raise self._damaged(f"ends at byte {offset + len(raw)}, {offset + size} are needed", tensor, offset)
        raise self._damaged(
            f"has other bytes than were written: checksum {checksum(raw):08x} instead of {expected:08x} "
            f"of the {size} bytes from byte {offset}",
            tensor,
            offset,
        )

    def _damaged(self, what: str, tensor: str | None, offset: int | None) -> Damaged:
        where = "" if tensor is None else f", in {tensor}"
        return Damaged(
            f"{paths.join(self._folder, self._file)} {what}{where}",
            ["train again: it is set aside, and the checkpoint before it is used"],
            self._file,
            tensor,
            offset,
        )
