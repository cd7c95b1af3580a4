"""What Ray Tune starts next, and when: one trial for each slot that is free.

Ray Tune's own limits count trials that wait with a checkpoint as running, so that a sweep whose trials wait would stand
still; here a trial that holds nothing takes no slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from ray_ft.tune.journal import Trial
from ray_ft.tune.rungs import Rungs, Verdict


class Slots:
    """How many more trials may be started. The loop of Ray Tune asks and tells, so that nothing here is locked.

    Args:
        cap: trials that may run at once.
    """

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._active = 0
        self.closed = False
        """Whether the sweep ends: nothing is started any more."""
        self.exhausted = False
        """Whether no new trials come."""

    def count(self, trials: Sequence[Any]) -> None:
        """Take stock of Ray Tune's trials."""
        self._active = sum(trial.status in ("PENDING", "RUNNING") for trial in trials)

    def take(self) -> bool:
        """Take a slot; False: there is none."""
        if self.closed or self._active >= self._cap:
            return False
        self._active += 1
        return True

    def give_back(self) -> None:
        """A slot that was taken is not needed."""
        self._active -= 1

    def suffice(self, count: int) -> bool:
        """Whether so many trials may run at once."""
        return count <= self._cap

    @property
    def active(self) -> int:
        """Trials that run, or are about to."""
        return self._active


class Proposals(Searcher):
    """Hands out what `source` proposes, as slots get free.

    Args:
        source: suggests {"number", "settings"}, and hears what becomes of it.
        count: trials that it will suggest at most.
    """

    def __init__(self, source: Searcher, slots: Slots, count: int) -> None:
        super().__init__(metric=source.metric, mode=source.mode)
        self._source, self._slots, self._left = source, slots, count
        slots.exhausted = not count

    def suggest(self, trial_id: str) -> Any:
        if self._slots.closed:
            return Searcher.FINISHED
        if not self._slots.take():
            return None
        found = self._source.suggest(trial_id) if self._left else Searcher.FINISHED
        if found is None or found == Searcher.FINISHED:
            self._slots.give_back()
            self._slots.exhausted = self._slots.exhausted or found is not None
            return found
        self._left -= 1
        self._slots.exhausted = not self._left
        return {"trial": found}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._source.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._source.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Part of Ray Tune's snapshots, which nothing reads."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""

    def __reduce__(self) -> Any:
        return object, ()


class Known:
    """Trials of the journal that are not over, by number; those that wait on a rung when their turn has come.

    Args:
        rungs: of the scheduler; None: it lets no trial wait.
        drop: takes a trial that will not go on.
    """

    def __init__(
        self, trials: Sequence[Trial], slots: Slots, rungs: Rungs | None, drop: Callable[[Trial], None]
    ) -> None:
        self._left = sorted(trials, key=lambda trial: trial.number)
        self._slots, self._rungs, self._drop = slots, rungs, drop

    def __bool__(self) -> bool:
        return bool(self._left)

    def next(self) -> Trial | None:
        """The next one that may run; a slot has been taken for it."""
        found = self._first()
        if found is None and self._left and self._slots.active <= 1:  # only those that wait are left
            assert self._rungs is not None
            self._rungs.close()
            found = self._first()
        return found

    def _first(self) -> Trial | None:
        for trial in list(self._left):
            verdict = Verdict.GO if self._rungs is None else self._rungs.verdict(trial.number)
            if verdict is not Verdict.WAIT:
                self._left.remove(trial)
            if verdict is Verdict.STOP:
                self._drop(trial)
            if verdict is Verdict.GO:
                if self._rungs is not None:
                    self._rungs.promote(trial.number)
                return trial
        return None


class Planned(Searcher):
    """Trials that are all known: those of a random search or a grid."""

    def __init__(self, known: Known, metric: str, mode: str) -> None:
        super().__init__(metric=metric, mode=mode)
        self._known = known

    def suggest(self, trial_id: str) -> Any:
        trial = self._known.next()
        if trial is not None:
            return {"number": trial.number, "settings": trial.settings}
        return None if self._known else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """What comes next does not depend on it."""
