"""Samples to fixed rows: best-fit decreasing, deterministic, documents kept apart.

Samples are placed longest first, each into the fullest row that still takes it (best-fit decreasing). Johnson (1974)
proves at most 11/9 of the optimal number of rows; in practice it is within 1%. Rows have exactly `seq_len` tokens.
Nothing is split; the two documents of a pair are one sample, and lie next to each other. One byte of flags per token
holds what attention and loss need to know. Images stay with their row, in the order of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ft.data.render import Tokens

REAL = 1  # a token of a sample; padding otherwise
START = 2  # first token of a sample: positions restart, attention does not reach back
TRAINED = 4  # target of the loss
REJECTED = 8  # of a pair's second document, the answer that was not preferred
IMAGE = 16  # stands for a part of an image: its embedding is replaced, and neighbours see each other both ways


@dataclass(frozen=True)
class Rows:
    """Fixed rows.

    Attributes:
        input_ids: int32 [rows, seq_len].
        flags: uint8 [rows, seq_len] of REAL | START | TRAINED | REJECTED | IMAGE.
        reference: where pairs have it, float32 [rows, documents]: of each document in the row, in their order, the sum
            of the reference model's log-probabilities of its targets; 0 behind the last one.
        images: of each row the files of its images, a tuple of bytes: object [rows]; None in a run without images.
        pixels: of each row what the tower is given, float32 [images, channels, height, width]: object [rows]. Made of
            `images`, in whose place it stands, when rows are about to be used: it is a hundred times as large.
    """

    input_ids: np.ndarray
    flags: np.ndarray
    reference: np.ndarray | None = None
    images: np.ndarray | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, index: np.ndarray | slice) -> Rows:
        return Rows(*(None if part is None else part[index] for part in self._parts))  # type: ignore[arg-type]

    def put(self, target: np.ndarray | slice, rows: Rows, index: np.ndarray | slice = slice(None)) -> None:
        """Write rows `index` of others, which have what these have, over those at `target`."""
        for ours, theirs in zip(self._parts, rows._parts, strict=True):
            if ours is not None:
                assert theirs is not None
                ours[target] = theirs[index]

    @property
    def _parts(self) -> tuple[np.ndarray | None, ...]:
        return self.input_ids, self.flags, self.reference, self.images, self.pixels

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        found: list[np.ndarray | None] = []
        for column in zip(*(part._parts for part in parts), strict=True):
            there = [part for part in column if part is not None]
            assert len(there) in (0, len(column))
            found.append(np.concatenate(there) if there else None)
        return Rows(*found)  # type: ignore[arg-type]

    @staticmethod
    def blank(count: int, seq_len: int, documents: int | None = None, *, images: bool = False) -> Rows:
        """Rows of nothing but padding: they fill the last batch and add nothing to the loss.

        Args:
            documents: width of `reference`; None: without.
            images: of a run with images; of these rows there are none.
        """
        flags = np.zeros((count, seq_len), np.uint8)
        flags[:, :1] = START
        reference = None if documents is None else np.zeros((count, documents), np.float32)
        files = objects([()] * count) if images else None
        return Rows(np.zeros((count, seq_len), np.int32), flags, reference, files)


def objects(items: Sequence[Any]) -> np.ndarray:
    """[items] of objects, where numpy would make a matrix of items of one length."""
    found = np.empty(len(items), object)
    for at, item in enumerate(items):
        found[at] = item
    return found


def plan(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Which samples share a row: lists of indices into `lengths`. Every length must be in 1…seq_len."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by free tokens: rows that have them, newest last
    # A Fenwick-free best fit: `occupied` is a bit set of the free sizes in use, so the tightest fit is one bit trick.
    occupied = 0
    for index in order:
        length = lengths[index]
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                occupied &= ~(1 << free)
        else:
            row, free = len(rows), seq_len
            rows.append([])
        rows[row].append(index)
        if left := free - length:
            open_rows[left].append(row)
            occupied |= 1 << left
    return rows


def pack(
    samples: Sequence[Tokens], seq_len: int, *, packing: bool, pad_id: int, images: bool = False
) -> tuple[Rows, list[list[int]]]:
    """Lay samples out in rows of `seq_len`; with `packing` false, one sample a row in the given order.

    Args:
        images: of a run with images, also where these samples have none.

    Returns:
        The rows, and for each the indices of its samples.
    """
    assignment = plan([len(s) for s in samples], seq_len) if packing else [[i] for i in range(len(samples))]
    input_ids = np.full((len(assignment), seq_len), pad_id, np.int32)
    flags = np.zeros((len(assignment), seq_len), np.uint8)
    for row, members in enumerate(assignment):
        at = 0
        for member in members:
            sample = samples[member]
            end = at + len(sample)
            input_ids[row, at:end] = sample.ids
            flags[row, at:end] = REAL | (sample.trained * TRAINED).astype(np.uint8)
            if sample.soft is not None:
                flags[row, at:end] |= (sample.soft * IMAGE).astype(np.uint8)
            flags[row, at] |= START
            if sample.rejected_at is not None:
                flags[row, at + sample.rejected_at] |= START
                flags[row, at + sample.rejected_at : end] |= REJECTED
            at = end
        if at < seq_len:
            flags[row, at] = START  # padding is a document of its own, which no sample sees and which sees none
    files = [tuple(file for member in members for file in samples[member].images) for members in assignment]
    return Rows(input_ids, flags, images=objects(files) if images else None), assignment


def pairs(flags: np.ndarray) -> np.ndarray:
    """How many pairs lie in each row: int64 [rows] from uint8 flags [rows, seq_len]."""
    return np.count_nonzero((flags & (START | REJECTED)) == (START | REJECTED), axis=1)


def position_ids(flags: np.ndarray) -> np.ndarray:
    """Positions that restart at each document: int64 [rows, seq_len] from uint8 flags of the same shape."""
    index = np.arange(flags.shape[1])
    starts = np.where(flags & START, index, 0)
    return index - np.maximum.accumulate(starts, axis=1)


def labels(input_ids: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Targets, not shifted: int64 [rows, seq_len], −100 (the ignore index of cross-entropy) where not trained."""
    return np.where(flags & TRAINED, input_ids, -100).astype(np.int64)
