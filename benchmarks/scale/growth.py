"""How a cost grows with the work: what was measured at several sizes, its growth exponent, and what it should be.

The exponent is the slope between the last two sizes on logarithmic axes: 1 where twice the work costs twice as much, 0
where it costs the same. What does not grow (a start, an import) lowers it, so the sizes have to be large enough that
little of the last one is that; a table shows them all. A cost that at one of these two sizes cannot be told from
nothing has no exponent, and no verdict: it is listed as not measurable.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.pairs import spread
from benchmarks.result import Figure, Table

#: Above what is due, up to this much is taken for noise and for what n log n adds.
SLACK = 0.1
#: A size that takes longer is measured only once.
PATIENCE = 15.0


@dataclass(frozen=True)
class Series:
    """One cost at growing sizes.

    Attributes:
        name: what costs: "listing files".
        of: what grows: "files".
        unit: of the values: "s", "MiB", "requests".
        due: the exponent that it should have at most: 1 where each piece of work costs, 0 where none should.
        values: size → what was measured, once for each repetition.
        floor: a size whose median is not above it, or of which one value is not above 0, is not told from nothing.
    """

    name: str
    of: str
    unit: str
    due: float
    values: Mapping[int, Sequence[float]]
    floor: float = 1e-9

    @property
    def measurable(self) -> bool:
        """Whether both of the last two sizes are told from nothing.

        Raises:
            ValueError: fewer than two sizes were measured.
        """
        if len(self.values) < 2:
            raise ValueError(f"{self.name}: an exponent takes two sizes, there are {len(self.values)}")
        last = [self.values[size] for size in sorted(self.values)[-2:]]
        return all(statistics.median(values) > self.floor and min(values) > 0 for values in last)

    @property
    def exponents(self) -> list[float]:
        """Of each repetition; a size that was measured less often lends its last value. None where not `measurable`."""
        return [exponent(below, above) for below, above in self._pairs()] if self.measurable else []

    def _pairs(self) -> list[tuple[tuple[int, float], tuple[int, float]]]:
        low, high = sorted(self.values)[-2:]
        count = max(len(self.values[low]), len(self.values[high]))
        take = lambda size, at: self.values[size][min(at, len(self.values[size]) - 1)]  # noqa: E731
        return [((low, take(low, at)), (high, take(high, at))) for at in range(count)]

    @property
    def per_unit(self) -> float:
        """What one more costs between the last two sizes: the median."""
        return statistics.median((above - below) / (large - small) for (small, below), (large, above) in self._pairs())

    @property
    def grows_too_fast(self) -> bool | None:
        """None where it cannot be told."""
        return statistics.median(self.exponents) > self.due + SLACK if self.measurable else None

    def figure(self) -> Figure | None:
        """The exponent against what is due; None where it cannot be told."""
        if not self.measurable:
            return None
        name = f"{self.name}: exponent over {self.of}"
        return Figure(name, self.exponents, at_most=round(self.due + SLACK, 2), form="{:.2f}")

    def row(self) -> tuple[str, str, str, str]:
        sizes = sorted(self.values)
        times = {len(self.values[size]) for size in sizes}
        found = spread(self.exponents, "{:.2f}") if self.measurable else "not measurable"
        return (
            f"{self.name} [{self.unit}]",
            " / ".join(f"{size:,}" for size in sizes) + f" {self.of}",
            " / ".join(number(statistics.median(self.values[size])) for size in sizes),
            f"{found}, due {self.due:g}; " + (f"{min(times)} to {max(times)}" if len(times) > 1 else f"{min(times)}"),
        )


def exponent(below: tuple[float, float], above: tuple[float, float]) -> float:
    """The slope between two (size, cost) on logarithmic axes; both costs are above 0."""
    (small, less), (large, more) = below, above
    return math.log(more / less) / math.log(large / small)


def measured(
    sizes: Sequence[int], run: Callable[[int], Mapping[str, float]], repeat: int
) -> dict[str, dict[int, list[float]]]:
    """What `run` says of each size, by its names: name → size → values. The first call of all is a warm-up of the
    smallest size; a size that took longer than `PATIENCE` is run once."""
    run(min(sizes))
    found: dict[str, dict[int, list[float]]] = {}
    long: set[int] = set()
    for _ in range(repeat):
        for size in sizes:
            if size in long:
                continue
            began = time.perf_counter()
            for name, value in run(size).items():
                found.setdefault(name, {}).setdefault(size, []).append(value)
            if time.perf_counter() - began > PATIENCE:
                long.add(size)
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def table(title: str, series: Sequence[Series]) -> Table:
    columns = ("", "sizes", "median at each", "exponent, what is due; repetitions")
    return Table(title, columns, [one.row() for one in series])


def number(value: float) -> str:
    """Three digits that count."""
    if value and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def say(part: str, series: Sequence[Series]) -> None:
    for one in series:
        found = spread(one.exponents, "{:.2f}") if one.measurable else "none"
        verdict = {None: "not measurable", True: "grows too fast", False: "as it should"}[one.grows_too_fast]
        print(f"{part}: {one.name}: exponent {found} over {one.of}, due {one.due:g}: {verdict}", file=sys.stderr)
