"""ASHA: a trial runs to the next rung and waits there, until it is among the best of those that came as far.

Asynchronous successive halving as published (Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys
2020): promotion, not stopping. Ray Tune's AsyncHyperBandScheduler never pauses a trial; it lets each one run on that is
good for what came before it, so that few trials at once stop little: in a row of trials that get better, none. Here
trials wait with a checkpoint, and go on from it as if they had never waited.

With an end to the number of trials, two things more are known than in the paper: a trial that enough others have beaten
can stop at once, and when no more trials come the best of the highest rung goes on to the end.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from enum import Enum


class Verdict(Enum):
    GO = "go on"
    WAIT = "wait"
    STOP = "stop"


class Rungs:
    """Who stands on which rung, and what becomes of them. Trials are known by their numbers.

    Args:
        expected: trials that will come in all.
        first: share of a run at which the lowest rung lies; each next one `eta` times as far.
        sign: 1 where less is better, -1 where more is.
    """

    def __init__(self, expected: int, first: float, eta: float, sign: int) -> None:
        self.expected, self._eta, self._sign = expected, eta, sign
        count = math.ceil(math.log(1 / first) / math.log(eta) - 1e-9)  # those below a whole run
        self.milestones = [first * eta**k for k in range(count)]
        self._values: list[dict[int, float]] = [{} for _ in self.milestones]
        self._promoted: list[set[int]] = [set() for _ in self.milestones]
        self._gone: set[int] = set()  # failed, or ended otherwise: they will not arrive anywhere
        self._failed: set[int] = set()
        self._finished = False
        # Of each rung, as long as nothing changes: every trial that waits is asked about again and again.
        self._ranked: dict[int, list[tuple[float, int]]] = {}
        self._completed: dict[int, bool] = {}
        self._left: list[int] | None = None  # see _last_resort

    def arrived(self, number: int, progress: float, value: float) -> bool:
        """Note a report; True where it brought the trial onto a rung."""
        new = False
        for rung, milestone in enumerate(self.milestones):
            if progress + 1e-9 >= milestone and number not in self._values[rung]:
                # NaN has no place in an order: it would put all the others anywhere too.
                self._values[rung][number] = math.inf if math.isnan(value) else self._sign * value
                self._changed()
                if rung:
                    self._promoted[rung - 1].add(number)
                new = True
        return new

    def gone(self, number: int, *, failed: bool = False, finished: bool = False) -> None:
        """Wait for it no more. One that failed holds nobody's place, also where it was the best."""
        self._gone.add(number)
        self._finished = self._finished or finished
        if failed:
            self._failed.add(number)
        self._changed()

    def level(self, number: int) -> int | None:
        """The highest rung on which a trial stands, or None."""
        return max((rung for rung, values in enumerate(self._values) if number in values), default=None)

    def verdict(self, number: int) -> Verdict:
        rung = self.level(number)
        if rung is None or number in self._promoted[rung]:
            return Verdict.GO
        rank = self._rank(rung, number)
        complete = self._complete(rung)
        places = self._quota(len(self._values[rung])) if complete else int(len(self._values[rung]) / self._eta)
        if rank < places:
            return Verdict.GO
        # Others can only make it worse; on higher rungs it is not known before how many will come.
        places = places if complete else self._quota(self.expected)
        never = rank >= places and (complete or rung == 0)
        # A better one may have stopped before those failed that were better still, and does not come back.
        if complete and number == self._last_resort():
            return Verdict.GO
        # Those that went on may fail: until one has finished, the next best waits.
        return Verdict.STOP if never and (self._finished or rank > places) else Verdict.WAIT

    def promote(self, number: int) -> None:
        """It goes on from where it stands."""
        if (rung := self.level(number)) is not None:
            self._promoted[rung].add(number)
            self._changed()

    def before(self, number: int) -> tuple[int, float]:
        """Sorts trials that may go on: the highest rung first, there the best."""
        rung = self.level(number)
        return (0, 0.0) if rung is None else (-rung, self._values[rung][number])

    def close(self) -> None:
        """No more trials come than have come."""
        self.expected = len(self._values[0].keys() | self._gone) if self._values else 0
        self._changed()

    def _changed(self) -> None:
        self._ranked.clear()
        self._completed.clear()
        self._left = None

    def _last_resort(self) -> int | None:
        """The best of those that stand somewhere, where none is under way and none has finished: it has to be this."""
        if self._left is None:
            left = [number for number in self._values[0] if number not in self._gone]
            levels = {number: rung for rung, values in enumerate(self._values) for number in values}  # the highest
            under_way = any(number in self._promoted[levels[number]] for number in left)
            self._left = [] if self._finished or under_way else sorted(left, key=self.before)[:1]
        return self._left[0] if self._left else None

    def _quota(self, count: int) -> int:
        """How many of a complete rung go on; one at least, so that one reaches the end."""
        return max(int(count / self._eta), 1)

    def _rank(self, rung: int, number: int) -> int:
        """How many on a rung are better."""
        return bisect_left(self._order(rung), (self._values[rung][number], number))

    def _order(self, rung: int) -> list[tuple[float, int]]:
        """(value, number) of all on a rung that have not failed, the best first."""
        if rung not in self._ranked:
            values = self._values[rung].items()
            self._ranked[rung] = sorted((value, one) for one, value in values if one not in self._failed)
        return self._ranked[rung]

    def _complete(self, rung: int) -> bool:
        """Whether nobody else will arrive on a rung."""
        if rung not in self._completed:
            self._completed[rung] = self._is_complete(rung)
        return self._completed[rung]

    def _is_complete(self, rung: int) -> bool:
        here = self._values[rung].keys() | self._gone
        if rung == 0:
            return len(here) >= self.expected
        if not self._complete(rung - 1):
            return False
        below = self._values[rung - 1]
        best = self._order(rung - 1)[: self._quota(len(below))]
        going = self._promoted[rung - 1] | {number for _, number in best}
        return going <= here
