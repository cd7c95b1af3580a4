"""A and B in turn, so that what else the machine does meets both alike."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PAIRS = 8


def interleaved(
    arms: Mapping[str, Callable[[int], Any]],
    count: int = PAIRS,
    warm_up: int = 1,
    show: Callable[[dict[str, Any]], str] = str,
) -> list[dict[str, Any]]:
    """What each arm gave, by name, pair for pair.

    Args:
        arms: what to measure. Each is called with the number of the pair; a warm-up has a negative one.
        count: pairs that count.
        warm_up: pairs before these, whose results are thrown away: page cache, allocators, compiled code.
        show: one line about a pair, printed once it is there.

    In each pair the arm that begins is another than in the one before.
    """
    found: list[dict[str, Any]] = []
    names = list(arms)
    for number in range(-warm_up, count):
        turn = number % len(names)
        pair = {}
        for name in names[turn:] + names[:turn]:
            gc.collect()
            pair[name] = arms[name](number)
        if number >= 0:
            found.append({name: pair[name] for name in names})
            print(f"pair {number + 1} of {count}: {show(found[-1])}", file=sys.stderr, flush=True)
    return found


def ratios(pairs: Sequence[Mapping[str, Any]], above: str, below: str, key: str | None = None) -> list[float]:
    """above ÷ below in each pair; `key` names the entry of an arm's result where it is a mapping."""
    take = (lambda one: one) if key is None else (lambda one: one[key])
    return [take(pair[above]) / take(pair[below]) for pair in pairs]


def differences(pairs: Sequence[Mapping[str, Any]], first: str, second: str, key: str | None = None) -> list[float]:
    """first − second in each pair."""
    take = (lambda one: one) if key is None else (lambda one: one[key])
    return [take(pair[first]) - take(pair[second]) for pair in pairs]


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """`median (least … most)`; a single value alone."""
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} … {form.format(max(values))})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent of all do not exceed, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share / 100 * (len(ordered) - 1)))]
