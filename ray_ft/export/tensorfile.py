"""Safetensors files a tensor at a time: read without mapping the file, written in one pass.

The library writes a file from a dict of all its tensors; here the header is written first, since shapes and types are
known, and each tensor's bytes follow as they come, so that memory holds one tensor. The format: 8 bytes of the header's
length (little endian), the header in JSON (name → dtype, shape, data_offsets from its end), the data without gaps
(safetensors' README, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from ray_ft.errors import ModelError

METADATA = "__metadata__"
BLOCK = 1 << 20  # bytes that are copied at once
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its element type as the format writes it, its shape, and its bytes [start, stop)."""

    code: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Iterable[int]) -> Entry:
        return cls(CODES[dtype], tuple(shape))

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start or math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """One file; `entries` in the order of their bytes.

    Raises:
        ModelError: it is not there, cut short, or no safetensors file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._stream: IO[bytes] = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise self._damaged(error) from error
        try:
            size = int.from_bytes(self._stream.read(8), "little")
            if not 0 < size <= HEADER_LIMIT:
                raise ValueError(f"its header would have {size} bytes")
            header: dict[str, Any] = json.loads(self._stream.read(size))
            header.pop(METADATA, None)
            begins = 8 + size
            found = {
                name: Entry(one["dtype"], tuple(one["shape"]), *(begins + at for at in one["data_offsets"]))
                for name, one in header.items()
            }
            end = max((entry.stop for entry in found.values()), default=begins)
            if (there := os.path.getsize(path)) != end:
                raise ValueError(f"it has {there} bytes, its header says {end}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._stream.close()
            raise self._damaged(error) from error
        self.entries = dict(sorted(found.items(), key=lambda item: item[1].start))

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._stream.seek(entry.start)
        if entry.size and tensor.numel():
            self._stream.readinto(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return tensor

    def blocks(self, name: str) -> Iterable[bytes]:
        """A tensor's bytes."""
        entry = self.entries[name]
        self._stream.seek(entry.start)
        for at in range(entry.start, entry.stop, BLOCK):
            yield self._stream.read(min(BLOCK, entry.stop - at))

    def _damaged(self, error: Exception) -> ModelError:
        return ModelError(f"{self.path} is damaged: {error}", ["fetch the folder again: a file may be incomplete"])


class Writer:
    """Writes a file whose tensors come one by one, in the order of `entries`, which are laid out anew."""

    def __init__(self, path: str, entries: Mapping[str, Entry]) -> None:
        header: dict[str, Any] = {METADATA: {"format": "pt"}}
        at = 0
        for name, entry in entries.items():
            header[name] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": [at, at + entry.size]}
            at += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
        self._left = list(entries)
        self._stream: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        assert kind is not None or not self._left, self._left

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.copy(name, [memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())])

    def copy(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        assert self._left.pop(0) == name, name
        for block in blocks:
            self._stream.write(block)


def folder_entries(folder: str) -> dict[str, dict[str, Entry]]:
    """File → name → entry, of all safetensors files in a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with Reader(str(path)) as reader:
            found[path.name] = reader.entries
    return found
