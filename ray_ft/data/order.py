"""The order of rows: a function of (data, recipe, seed) alone.

Position p of the endless sequence of rows is fixed: epoch p ÷ N, and within the epoch a seeded permutation. Whole units
are permuted first and grouped into windows of `shuffle_window` tokens; rows are then permuted within a window, so that
one window in memory is enough. Nothing here knows of workers, timing or Ray: any process can compute which rows any
step uses, and resuming is starting at another position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ray_ft.data.pack import Rows
from ray_ft.data.prepare import Prepared, Unit
from ray_ft.recipe import Recipe


@dataclass(frozen=True)
class Slice:
    """Consecutive positions that one reading task serves: rows [skip, skip + take) of one window.

    `seed` is None where the rows are not shuffled; no units means padding behind the last row.
    """

    position: int
    units: tuple[Unit, ...]
    seed: tuple[int, ...] | None
    skip: int
    take: int

    def read(self, prepared: Prepared) -> Rows:
        if not self.units:
            return Rows.blank(self.take, prepared.seq_len)
        return prepared.read(self.units).take(self._chosen())

    def names(self, prepared: Prepared) -> list[list[str]]:
        """``file:line`` of the samples in each of the rows."""
        if not self.units:
            return [["padding"]] * self.take
        found = []
        for index in self._chosen().tolist():
            for unit in self.units:
                if index < unit.rows:
                    found.append(prepared.names(unit, index))
                    break
                index -= unit.rows
        return found

    def _chosen(self) -> np.ndarray:
        """Indices into the window's rows."""
        size = sum(unit.rows for unit in self.units)
        order = np.arange(size) if self.seed is None else np.random.default_rng(self.seed).permutation(size)
        return order[self.skip : self.skip + self.take]


@dataclass(frozen=True)
class Order:
    """The sequence of packed rows over all epochs."""

    prepared: Prepared
    seed: int
    shuffle: bool
    window_rows: int
    epochs: int

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared) -> Order:
        """Training order; `train.max_steps` takes as many epochs as it needs."""
        epochs = recipe.train.epochs
        if recipe.train.max_steps is not None:
            epochs = -(-recipe.train.max_steps * recipe.train.global_batch // prepared.rows)
        window_rows = max(recipe.data.shuffle_window // recipe.data.seq_len, 1)
        return cls(prepared, recipe.run.seed, recipe.data.shuffle, window_rows, epochs)

    @classmethod
    def once(cls, prepared: Prepared, window_rows: int = 4096) -> Order:
        """Every row once, as prepared: for evaluation."""
        return cls(prepared, 0, False, window_rows, 1)

    @property
    def rows(self) -> int:
        """Rows of all epochs together; positions from here on are padding."""
        return self.prepared.rows * self.epochs

    def slices(self, start: int, stop: int) -> Iterator[Slice]:
        """The slices that serve positions [start, stop), in order."""
        per_epoch = self.prepared.rows
        for epoch in range(start // per_epoch, min(-(-stop // per_epoch), self.epochs)):
            position = epoch * per_epoch
            for number, window in enumerate(self._windows(epoch)):
                size = sum(unit.rows for unit in window)
                skip, end = max(start - position, 0), min(stop - position, size)
                if skip < end:
                    seed = (self.seed, epoch, 1 + number) if self.shuffle else None
                    yield Slice(position + skip, window, seed, skip, end - skip)
                position += size
        if stop > (padding := max(start, self.rows)):
            yield Slice(padding, (), None, 0, stop - padding)

    def locate(self, position: int) -> list[str]:
        """``file:line`` of the samples in the row at one position."""
        return next(self.slices(position, position + 1)).names(self.prepared)[0]

    def _windows(self, epoch: int) -> Iterator[tuple[Unit, ...]]:
        units = self.prepared.units
        if self.shuffle:
            units = tuple(units[i] for i in np.random.default_rng((self.seed, epoch)).permutation(len(units)))
        window: list[Unit] = []
        rows = 0  # of the window; summed anew for each unit, the time would grow with its square
        for unit in units:
            if window and rows + unit.rows > self.window_rows:
                yield tuple(window)
                window, rows = [], 0
            window.append(unit)
            rows += unit.rows
        if window:
            yield tuple(window)
