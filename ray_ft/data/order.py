"""The order of rows: a function of (data, recipe, seed) alone.

A source has an endless sequence of passes; each pass is a seeded permutation of its units, and of the rows of a unit
that is cut. With weight w and N rows, epoch e takes rows [⌊e·w·N⌋, ⌊(e+1)·w·N⌋) of that sequence, reckoned in
fractions: over any run of epochs a source is used evenly to a row, and with weight 1 an epoch is one pass.

An epoch of R rows is cut into ⌈R ÷ window⌉ windows of `shuffle_window` tokens. Each source gives every window its equal
share, to a row; rows are then permuted within the window, so that one window in memory is enough. Nothing here knows of
workers, timing or Ray: any process can compute which rows any step uses, and resuming is starting at another position.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ray_ft.data.pack import Rows
from ray_ft.data.prepared import Prepared, Unit
from ray_ft.recipe import Recipe

ORDER = 2  # part of a run's identity: raise it when the same data, recipe and seed would give another sequence
PADDING = "padding"  # stands for the sample of a row behind the last
MANY_PASSES = 10  # of one source over a run, above which people are told that its rows may be learnt by heart
PASS, UNIT, WINDOW = range(3)  # what a seed is for


class Part(NamedTuple):
    """Rows [low, high) of a unit, permuted by `seed`; None: as they were prepared."""

    unit: Unit
    low: int
    high: int
    seed: tuple[int, ...] | None


@dataclass(frozen=True)
class Slice:
    """Consecutive positions that one reading task serves: rows [skip, skip + take) of one window.

    `seed` is None where the rows are not shuffled; no parts means padding behind the last row.
    """

    position: int
    parts: tuple[Part, ...]
    seed: tuple[int, ...] | None
    skip: int
    take: int

    def read(self, prepared: Prepared) -> Rows:
        return self._read(prepared, tokens=True, samples=False)[0]

    def read_named(self, prepared: Prepared) -> tuple[Rows, list[tuple[str, ...]]]:
        """The rows, and the samples in each as `names` gives them."""
        return self._read(prepared, tokens=True, samples=True)

    def names(self, prepared: Prepared) -> list[list[str]]:
        """``file:line`` of the samples in each of the rows."""
        return [list(row) for row in self._read(prepared, tokens=False, samples=True)[1]]

    def _read(self, prepared: Prepared, *, tokens: bool, samples: bool) -> tuple[Rows, list[tuple[str, ...]]]:
        """What was not asked for is blank. Only units that give the slice a row are read, one after the other."""
        rows = prepared.blank(self.take if tokens else 0)
        names: list[tuple[str, ...]] = [(PADDING,)] * (self.take if samples else 0)
        wanted = sorted(self.parts_read(), key=lambda found: (found[0].chunk, found[0].group))
        loads = prepared.segments([unit for unit, _, _ in wanted], tokens=tokens, samples=samples)
        for (_, index, target), loaded in zip(wanted, loads, strict=True):
            if loaded.rows is not None:
                rows.put(target, loaded.rows, index)
            if loaded.samples is not None:
                for at, row in zip(target.tolist(), index.tolist(), strict=True):
                    names[at] = loaded.samples[row]
        return rows, names

    def parts_read(self) -> list[tuple[Unit, np.ndarray, np.ndarray]]:
        """(unit, indices into its rows, where these go in the slice) for each unit that gives the slice a row."""
        ends = np.cumsum([part.high - part.low for part in self.parts], dtype=np.int64)
        size = int(ends[-1]) if self.parts else 0
        window = np.arange(size) if self.seed is None else np.random.default_rng(self.seed).permutation(size)
        chosen = window[self.skip : self.skip + self.take]
        targets = np.argsort(chosen)  # places in the slice, in the order of the parts
        cuts = np.searchsorted(chosen[targets], ends).tolist()
        found: dict[Unit, list[tuple[np.ndarray, np.ndarray]]] = {}  # a unit may stand in a window twice
        for part, end, begin, stop in zip(self.parts, ends.tolist(), [0, *cuts], cuts, strict=False):
            if begin < stop:
                target = targets[begin:stop]
                index = chosen[target] - (end - part.high)
                if part.seed is not None:
                    index = np.random.default_rng(part.seed).permutation(part.unit.rows)[index]
                found.setdefault(part.unit, []).append((index, target))
        return [(unit, *(np.concatenate(both) for both in zip(*pairs, strict=True))) for unit, pairs in found.items()]  # type: ignore[misc]


@dataclass(frozen=True)
class Passes:
    """The endless sequence of passes over one source; `seed` None: units and rows as they were prepared."""

    source: int
    units: tuple[Unit, ...]
    weight: Fraction
    seed: int | None
    _arranged: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([unit.rows for unit in self.units], np.int64)

    @cached_property
    def rows(self) -> int:
        """Of one pass."""
        return int(self._sizes.sum())

    def start(self, epoch: int) -> int:
        """Row of the sequence at which an epoch begins."""
        return epoch * self.weight.numerator * self.rows // self.weight.denominator

    def parts(self, low: int, high: int) -> Iterator[Part]:
        """Rows [low, high) of the sequence."""
        while low < high:
            number, inner = divmod(low, self.rows)
            units, ends = self._arrangement(number)
            stop = min(high - number * self.rows, self.rows)
            first = int(np.searchsorted(ends, inner, side="right"))
            last = int(np.searchsorted(ends, stop, side="left"))
            for at in range(first, last + 1):
                index = int(units[at])
                unit, end = self.units[index], int(ends[at])
                begin = end - unit.rows
                cut = max(inner - begin, 0), min(stop, end) - begin
                seed = None
                if self.seed is not None and cut != (0, unit.rows):
                    seed = (self.seed, UNIT, self.source, number, index)
                yield Part(unit, *cut, seed)
            low = number * self.rows + stop

    def _arrangement(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(units in the order of one pass, the row of the pass at which each ends)."""
        if number not in self._arranged:
            for old in [known for known in self._arranged if known < number - 1]:
                del self._arranged[old]
            units = np.arange(len(self.units))
            if self.seed is not None:
                units = np.random.default_rng((self.seed, PASS, self.source, number)).permutation(len(units))
            self._arranged[number] = units, np.cumsum(self._sizes[units])
        return self._arranged[number]


@dataclass(frozen=True)
class Order:
    """The sequence of packed rows over all epochs. `weights` are those of the sources; of one not named, 1.

    `ledger`: whether batches carry the names of their samples.
    """

    prepared: Prepared
    seed: int
    shuffle: bool
    window_rows: int
    epochs: int
    weights: tuple[float, ...] = ()
    ledger: bool = False

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared) -> Order:
        """Training order; `train.max_steps` takes as many epochs as it needs."""
        order = cls(
            prepared,
            recipe.run.seed,
            recipe.data.shuffle,
            max(recipe.data.shuffle_window // recipe.data.seq_len, 1),
            recipe.train.epochs,
            tuple(source.weight for source in recipe.data.train),
            recipe.data.ledger,
        )
        if recipe.train.max_steps is not None and prepared.rows:
            last = order.epoch_of(recipe.train.max_steps * recipe.train.global_batch - 1)
            order = replace(order, epochs=last + 1)
        return order

    @classmethod
    def once(cls, prepared: Prepared, window_rows: int | None = None) -> Order:
        """Every row once, as prepared: for evaluation. A window is held in memory: by default 4 million tokens."""
        return cls(prepared, 0, False, window_rows or max(4_000_000 // prepared.seq_len, 1), 1)

    @property
    def rows(self) -> int:
        """Rows of all epochs together; positions from here on are padding."""
        return self.start(self.epochs)

    def start(self, epoch: int) -> int:
        """Position at which an epoch begins."""
        return sum(source.start(epoch) for source in self._sources)

    def epoch_of(self, position: int) -> int:
        """The epoch that a position lies in, were there no last one."""
        each = sum(source.weight * source.rows for source in self._sources)
        epoch = math.floor(position / each)  # start(epoch) is never beyond epoch × each
        while self.start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def slices(self, start: int, stop: int) -> Iterator[Slice]:
        """The slices that serve positions [start, stop), in order; what lies before is not looked at."""
        end = min(stop, self.rows)
        if start < end:
            for epoch in range(self.epoch_of(start), self.epochs):
                if (first := self.start(epoch)) >= end:
                    break
                offset = max(start - first, 0)
                windows = self._mixed(epoch, offset) if self.shuffle else self._plain(epoch, offset)
                for number, before, parts in windows:
                    position, size = first + before, sum(part.high - part.low for part in parts)
                    if position >= end:
                        break
                    skip, take = max(start - position, 0), min(end - position, size)
                    if skip < take:
                        seed = (self.seed, WINDOW, epoch, number) if self.shuffle else None
                        yield Slice(position + skip, parts, seed, skip, take - skip)
        if stop > (padding := max(start, self.rows)):
            yield Slice(padding, (), None, 0, stop - padding)

    def locate(self, position: int) -> list[str]:
        """``file:line`` of the samples in the row at one position."""
        return next(self.slices(position, position + 1)).names(self.prepared)[0]

    @property
    def source_numbers(self) -> tuple[int, ...]:
        """Of the sources that have any row, ascending."""
        return tuple(source.source for source in self._sources)

    def sources(self, start: int, stop: int) -> np.ndarray:
        """Number of the source of each row at positions [start, stop): int64; −1 for padding."""
        found = np.full(stop - start, -1, np.int64)
        for part in self.slices(start, stop):
            for unit, _, target in part.parts_read():
                found[part.position - start + target] = unit.source
        return found

    def passes(self, stop: int | None = None) -> dict[int, float]:
        """How often each source is gone through in positions [0, stop), of all epochs without `stop`."""
        stop = self.rows if stop is None else min(stop, self.rows)
        if not stop:
            return {source.source: 0.0 for source in self._sources}
        epoch = self.epoch_of(stop - 1)
        inner, size = stop - self.start(epoch), self.start(epoch + 1) - self.start(epoch)
        found = {}
        for source in self._sources:
            begin, end = source.start(epoch), source.start(epoch + 1)
            taken = (end - begin) * inner / size if self.shuffle else min(max(inner, 0), end - begin)
            inner -= 0 if self.shuffle else end - begin
            found[source.source] = (begin + taken) / source.rows
        return found

    def passes_lines(self, stop: int | None = None) -> list[str]:
        """Says to people how often each source is used, where that is not the number of epochs or is very often."""
        passes = self.passes(stop)
        mixed = len(passes) > 1 or any(source.weight != 1 for source in self._sources)
        if not mixed and all(often <= MANY_PASSES for often in passes.values()):
            return []
        each = ", ".join(f"data.train.{number}: {often:.3g}" for number, often in passes.items())
        often = [
            f"data.train.{source.source}: each of its {source.rows:,} packed rows is trained on about "
            f"{passes[source.source]:.0f} times"
            for source in self._sources
            if passes[source.source] > MANY_PASSES
        ]
        return [f"passes over the whole run: {each}", *often]

    @cached_property
    def _sources(self) -> list[Passes]:
        units: dict[int, list[Unit]] = {}
        for unit in self.prepared.units:
            units.setdefault(unit.source, []).append(unit)
        seed = self.seed if self.shuffle else None
        weights = dict(enumerate(self.weights))
        return [
            Passes(number, tuple(units[number]), as_fraction(weights.get(number, 1.0)), seed)
            for number in sorted(units)
        ]

    @cached_property
    def _window(self) -> int:
        """Rows of a window: at least those of a unit, as one is read whole anyway."""
        return max(self.window_rows, max((unit.rows for unit in self.prepared.units), default=1))

    def _mixed(self, epoch: int, offset: int) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
        """(number, rows of the epoch before it, parts) of each window from the one that holds row `offset` on."""
        spans = [(source.start(epoch), source.start(epoch + 1)) for source in self._sources]
        windows = -(-sum(end - begin for begin, end in spans) // self._window)
        if not windows:  # weights so small that this epoch takes no row
            return
        # Where the shares are no whole numbers, sources round up in different windows.
        shift = [at * windows // len(spans) for at in range(len(spans))]

        def cut(window: int) -> list[int]:
            """Rows of each source before a window; the steps from one window to the next are its shares."""
            return [((end - begin) * window + by) // windows for (begin, end), by in zip(spans, shift, strict=True)]

        def before(window: int) -> int:
            return sum(cut(window))

        first = bisect_right(range(windows), offset, key=before) - 1
        for number in range(first, windows):
            shares = zip(self._sources, spans, cut(number), cut(number + 1), strict=True)
            parts = tuple(
                part for source, (begin, _), low, high in shares for part in source.parts(begin + low, begin + high)
            )
            yield number, before(number), parts

    def _plain(self, epoch: int, offset: int) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
        """The same without shuffling: one source after the other, whole parts to a window."""
        if epoch not in self._plain_cuts:  # of one epoch at a time, as they are gone through in order
            self._plain_cuts.clear()
            self._plain_cuts[epoch] = self._cut_plainly(epoch)
        cuts = self._plain_cuts[epoch]
        for number in range(bisect_right(cuts, offset) - 1, len(cuts) - 1):
            parts: list[Part] = []
            rows = 0  # of the sources before
            for source in self._sources:
                begin, end = source.start(epoch), source.start(epoch + 1)
                low, high = max(cuts[number] - rows, 0), min(cuts[number + 1] - rows, end - begin)
                parts += source.parts(begin + low, begin + high)
                rows += end - begin
            yield number, cuts[number], tuple(parts)

    @cached_property
    def _plain_cuts(self) -> dict[int, list[int]]:
        """Epoch → rows of it before each window, and all of them. Batch by batch the same are asked for."""
        return {}

    def _cut_plainly(self, epoch: int) -> list[int]:
        cuts, rows = [0], 0
        for source in self._sources:
            for part in source.parts(source.start(epoch), source.start(epoch + 1)):
                size = part.high - part.low
                if rows and rows + size > self._window:
                    cuts.append(cuts[-1] + rows)
                    rows = 0
                rows += size
        return [*cuts, cuts[-1] + rows] if rows else cuts


def as_fraction(weight: float) -> Fraction:
    """The fraction nearest to a weight, of four digits below the line (more below 1): 0.1 is 1/10, 0.33333 a third."""
    return Fraction(weight).limit_denominator(max(10_000, math.ceil(10_000 / weight)))
