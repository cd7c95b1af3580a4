"""Spans in files: one safetensors file for each worker, on any filesystem, read again in any other cut.

A checkpoint's folder holds ``shard_00000.safetensors`` and so on, in which each tensor is one dimension long: the run
of the flattened whole that this worker owned. ``index.json`` says which file holds which run of which tensor. Whoever
reads asks for the runs that it wants and reads those bytes alone, so neither the strategy nor the number of workers
that wrote matters. Nothing is pickled, and memory holds one block at a time.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import torch

from ray_ft import paths
from ray_ft.errors import CheckpointError
from ray_ft.span import Span

INDEX = "index.json"
BLOCK = 1 << 26  # bytes that are copied at once

#: Names of element types in the safetensors format.
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its whole shape, and its runs as (file, start, stop), in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[tuple[str, int, int], ...]


#: What one worker wrote: tensor name → (start, stop, shape, element type), and the file's name.
Written = tuple[str, dict[str, tuple[int, int, tuple[int, ...], str]]]


def write(folder: str, rank: int, spans: Mapping[str, Span]) -> Written:
    """Write what this worker owns of `spans` into its file."""
    owned = {name: span for name, span in sorted(spans.items()) if span.owner and span.data.numel()}
    header: dict[str, Any] = {}
    offset = 0
    for name, span in owned.items():
        size = span.data.numel() * span.data.element_size()
        header[name] = {
            "dtype": CODES[span.data.dtype],
            "shape": [span.data.numel()],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    file = f"shard_{rank:05d}.safetensors"
    location = paths.join(folder, file)
    fs, path = paths.filesystem(location)
    fs.create_dir(os.path.dirname(path), recursive=True)
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for span in owned.values():
            for block in _blocks(span.data):
                stream.write(block.contiguous().view(torch.uint8).numpy())
    if isinstance(fs, pafs.LocalFileSystem):
        _flush_to_disk(path)
    return file, {name: (span.start, span.stop, span.shape, CODES[span.data.dtype]) for name, span in owned.items()}


def _blocks(data: torch.Tensor) -> Iterator[torch.Tensor]:
    size = BLOCK // data.element_size()
    for start in range(0, data.numel(), size):
        yield data[start : start + size].detach().cpu()


def _flush_to_disk(path: str) -> None:
    # A machine that loses power must not leave a committed checkpoint whose bytes never left its memory.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_index(folder: str, written: list[Written]) -> None:
    """Say where everything is, from what all workers wrote.

    Raises:
        CheckpointError: the runs of a tensor do not make up the whole.
    """
    index: dict[str, dict[str, Any]] = {}
    for file, entries in written:
        for name, (start, stop, shape, code) in entries.items():
            entry = index.setdefault(name, {"shape": list(shape), "dtype": code, "runs": []})
            entry["runs"].append([file, start, stop])
    for name, entry in index.items():
        entry["runs"].sort(key=lambda run: run[1])
        at, numel = 0, Span(torch.empty(0), 0, tuple(entry["shape"])).numel
        for _, start, stop in entry["runs"]:
            if start != at:
                break
            at = stop
        if at != numel:
            raise CheckpointError(
                f"the workers' pieces of {name} do not make up its {numel} elements: {entry['runs'][:4]}",
                ["report this with the recipe; it should not happen"],
            )
    paths.write_json(paths.join(folder, INDEX), index)


def read_index(folder: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name."""
    return {
        name: Stored(
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
            tuple((file, start, stop) for file, start, stop in entry["runs"]),
        )
        for name, entry in paths.read_json(paths.join(folder, INDEX)).items()
    }


def read(folder: str, index: Mapping[str, Stored], spans: Mapping[str, Span]) -> None:
    """Fill spans in place, whatever cut they were written in; values are converted to each span's element type."""
    wanted: dict[str, list[tuple[str, int, int]]] = {}
    for name, span in spans.items():
        for file, start, stop in index[name].runs:
            low, high = max(start, span.start), min(stop, span.stop)
            if low < high:
                wanted.setdefault(file, []).append((name, low, high))
    for file, runs in sorted(wanted.items()):
        fs, path = paths.filesystem(paths.join(folder, file))
        with fs.open_input_file(path) as stream:
            (length,) = struct.unpack("<Q", stream.read_at(8, 0))
            header = json.loads(stream.read_at(length, 8))
            for name, low, high in runs:
                begins = next(start for at, start, _ in index[name].runs if at == file)
                first = 8 + length + header[name]["data_offsets"][0]
                dtype, span = index[name].dtype, spans[name]
                step = BLOCK // dtype.itemsize
                for at in range(low, high, step):
                    end = min(at + step, high)
                    raw = stream.read_at((end - at) * dtype.itemsize, first + (at - begins) * dtype.itemsize)
                    values = torch.frombuffer(bytearray(raw), dtype=dtype)
                    span.data[at - span.start : end - span.start].copy_(values)
