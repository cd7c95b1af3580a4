"""How long samples are in several kinds of data, and how few packed rows could hold them.

Limit: lengths are drawn, in shapes that such data has; they are not counted from any data set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLES = 100_000  # of each distribution, at most
TOKENS = 2_500_000  # of each distribution, at most: two chunks of ray-ft's preparation, packed one by one
SHORTEST = 4


@dataclass(frozen=True)
class Lengths:
    """A distribution of samples' tokens.

    Attributes:
        about: for people.
        draw: lengths from (generator, how many, seq_len), still without bounds.
        realistic: whether it counts in the mean; the others show what no packing can do.
    """

    about: str
    draw: Callable[[np.random.Generator, int, int], np.ndarray]
    realistic: bool = True


def _lognormal(median: float, sigma: float) -> Callable[[np.random.Generator, int, int], np.ndarray]:
    return lambda rng, count, seq_len: rng.lognormal(np.log(median), sigma, count)


DISTRIBUTIONS = {
    "demo": Lengths("normal, mean 33, deviation 7, as the demo's", lambda rng, count, _: rng.normal(33, 7, count)),
    "chat": Lengths("lognormal, median 200, σ 0.9", _lognormal(200, 0.9)),
    "long tail": Lengths("lognormal, median 400, σ 1.5, so that many are cut to seq_len", _lognormal(400, 1.5)),
    "labels": Lengths("lognormal, median 24, σ 0.4", _lognormal(24, 0.4)),
    "over half": Lengths(
        "even between half of seq_len and all of it, so that no two share a row",
        lambda rng, count, seq_len: rng.uniform(seq_len // 2 + 1, seq_len, count),
        realistic=False,
    ),
}


def drawn(name: str, seq_len: int, seed: int, samples: int = SAMPLES, tokens: int = TOKENS) -> np.ndarray:
    """Lengths, int64: as many samples as both limits allow; longer ones are cut to seq_len, as both sides would."""
    rng = np.random.default_rng(seed)
    found = np.clip(DISTRIBUTIONS[name].draw(rng, samples, seq_len).round().astype(np.int64), SHORTEST, seq_len)
    return found[: max(int(np.searchsorted(np.cumsum(found), tokens)), 1)]


def fewest(lengths: np.ndarray, seq_len: int) -> int:
    """Rows that any packing needs at least, without splitting a sample.

    Martello and Toth's bound L2 (Knapsack Problems, 1990, section 8.3.2): samples longer than half a row need one each;
    what of the others does not fit beside them needs more. With a limit of 0 it is at least ⌈tokens ÷ seq_len⌉.
    """
    counts = np.bincount(lengths, minlength=seq_len + 1)
    number, total = np.cumsum(counts), np.cumsum(counts * np.arange(seq_len + 1))
    half = seq_len // 2
    best = 0
    for limit in range(half + 1):  # samples shorter than it are left out
        alone = number[-1] - number[seq_len - limit]  # beside these not even one of `limit` fits
        large = number[seq_len - limit] - number[half]
        room = large * seq_len - (total[seq_len - limit] - total[half])
        small = total[half] - (total[limit - 1] if limit else 0)
        best = max(best, int(alone + large + max(0, -(-(small - room) // seq_len))))
    return best
