"""A straight line through a cost that cannot be negative, and how much is known of it.

Limit: the errors are those of ordinary least squares (independent, of one size), which few repetitions on a machine
that does other things too fulfil only roughly; they are there to keep noise from passing for a cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Standard errors that count as certain: 95% of the time, where errors are normal.
CERTAIN = 2.0


@dataclass(frozen=True)
class Linear:
    """A cost by the number of workers: `fixed`, and `each` more for every worker.

    Attributes:
        variances: of `fixed`, of `each`, and their covariance.
    """

    fixed: float
    each: float
    variances: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, values: Mapping[int, Sequence[float]]) -> Linear:
        """The line of non-negative least squares through all that was measured, by the number of workers.

        Of two coefficients (Lawson & Hanson 1974, chapter 23): the free line where both are above 0; else the better of
        the two lines that have only one, each fitted anew.

        Raises:
            ValueError: fewer than two sizes, or fewer than three values.
        """
        points = [(size, value) for size, several in values.items() for value in several]
        count = len(points)
        if len(values) < 2 or count < 3:
            raise ValueError(f"a line with an error takes 2 sizes and 3 values, there are {len(values)} and {count}")
        sizes, found = [float(size) for size, _ in points], [value for _, value in points]
        mean = sum(sizes) / count
        spread = sum((size - mean) ** 2 for size in sizes)
        squares = sum(size * size for size in sizes)
        each = sum((size - mean) * value for size, value in zip(sizes, found, strict=True)) / spread
        fixed = sum(found) / count - each * mean
        noise = _squares(points, fixed, each) / (count - 2)
        variances = (noise * squares / (count * spread), noise / spread, -noise * mean / spread)
        if fixed < 0 or each < 0:
            flat = max(sum(found) / count, 0.0), 0.0
            through = 0.0, max(sum(size * value for size, value in points) / squares, 0.0)
            fixed, each = min((flat, through), key=lambda one: _squares(points, *one))
        return cls(fixed, each, variances)

    def beside(self) -> float:
        """Where each worker's part runs beside the others'."""
        return self.fixed + self.each

    def in_a_row(self, workers: int) -> float:
        """Where all come one after the other."""
        return self.fixed + self.each * workers

    def error(self, workers: int) -> float:
        """Standard error of `in_a_row`."""
        fixed, each, both = self.variances
        return math.sqrt(max(fixed + workers * workers * each + 2 * workers * both, 0.0))

    def most(self, workers: int) -> float:
        """What `in_a_row` is not above, as far as it is known."""
        return self.in_a_row(workers) + CERTAIN * self.error(workers)

    def said(self) -> tuple[str, str]:
        """`fixed` and `each` in thousandths with their errors; what is not told from 0 as what it is not above."""
        return _said(self.fixed, self.variances[0]), _said(self.each, self.variances[1])


def _squares(points: Sequence[tuple[int, float]], fixed: float, each: float) -> float:
    return sum((value - fixed - each * size) ** 2 for size, value in points)


def _said(value: float, variance: float) -> str:
    error = math.sqrt(variance)
    if value > CERTAIN * error:
        return f"{1000 * value:.3g} ± {1000 * error:.2g}" if error else f"{1000 * value:.3g}"
    return f"not told from 0, ≤ {1000 * (value + CERTAIN * error):.3g}"
