"""Whether one system is better than another on the same rows, or only luckier: the paired bootstrap.

Koehn (2004), "Statistical Significance Tests for Machine Translation Evaluation", EMNLP: rows are drawn again with
replacement, both systems are scored on the same draw, and how their difference varies over many draws says how much of
it is chance. A corpus score is no mean of sentence scores, so what is drawn are rows of sufficient statistics (such as
n-gram counts), whose sums give the corpus score of a draw.

Limits: it knows of the rows that were asked, not of other seeds of the training; and of fewer than about 30 rows its
intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

LEVEL = 0.95
BLOCK = 2_000_000  # numbers of draws, or of their sums, that are held at once: 16 MB

#: Sums of statistics float64 [k] to a score; nan where they have none.
Score = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Difference:
    """By how much a model's score is above its base's.

    Attributes:
        value: on all rows.
        low, high: 95 % percentile interval.
        p: two-sided: twice the share of draws in which the other system is at least as good; 1 for identical systems,
            and for a single row, of which every draw is the same.
    """

    value: float
    low: float
    high: float
    p: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def compare(model: np.ndarray, base: np.ndarray, score: Score, resamples: int, seed: int) -> Difference | None:
    """The difference between two systems' scores, with its interval.

    Args:
        model, base: statistics [rows, k] of both, row by row of the same questions.
        seed: the same one draws the same rows, for every metric.

    Returns:
        None where there is no score, such as without rows.
    """
    if model.shape != base.shape:
        raise ValueError(f"statistics of {model.shape} and {base.shape} are not of the same rows")
    rows = len(model)
    value = score(model.sum(0)) - score(base.sum(0)) if rows else np.nan
    if np.isnan(value):
        return None
    drawn = resampled(model, score, resamples, seed) - resampled(base, score, resamples, seed)
    drawn = drawn[~np.isnan(drawn)]  # draws without any row that the metric counts
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]).tolist() if len(drawn) else (value, value)
    # One more of each, so that no finite number of draws gives p = 0 (Davison & Hinkley 1997, section 4.2.2).
    tail = (min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)) + 1) / (len(drawn) + 1)
    return Difference(float(value), low, high, 1.0 if rows == 1 else min(2 * tail, 1.0))


def resampled(statistics: np.ndarray, score: Score, resamples: int, seed: int) -> np.ndarray:
    """Scores float64 [resamples] of draws from statistics [rows, k]; the draws depend on rows, resamples and seed."""
    found = [score(sums) for counts in _draws(statistics.shape, resamples, seed) for sums in counts @ statistics]
    return np.array(found, dtype=np.float64)


def _draws(shape: tuple[int, ...], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is in a draw: float64 [draws, rows], some draws at once."""
    generator, rows = np.random.default_rng(seed), shape[0]
    block = max(BLOCK // max(shape), 1)
    for start in range(0, resamples, block):
        chosen = generator.choice(rows, size=(min(block, resamples - start), rows), replace=True)
        offsets = np.arange(len(chosen))[:, None] * rows
        yield np.bincount((chosen + offsets).ravel(), minlength=chosen.size).reshape(chosen.shape).astype(np.float64)
