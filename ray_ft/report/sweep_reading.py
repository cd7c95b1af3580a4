"""What a sweep's directory says, read once: what it has in common with a run's, and the journal of its trials."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray_ft import artifacts, paths
from ray_ft.errors import StorageError
from ray_ft.recipe.tune import TRIALS
from ray_ft.report.reading import LEAST_QUIET, Record
from ray_ft.tune.journal import TRIAL, Sweep, Trial
from ray_ft.tune.results import by_number


@dataclass
class Swept:
    """A sweep's directory as Python objects. No string in it holds credentials of a URI of the recipe.

    Attributes:
        record: what its directory has in common with a run's: the recipe, the location.
        written: when the journal was last written, in seconds since the epoch; None where storage does not say.
    """

    record: Record
    sweep: Sweep
    written: float | None

    @classmethod
    def read(cls, record: Record) -> Swept:
        """Read the journal of the sweep in a directory that has one.

        Raises:
            StorageError: it cannot be read, or is of another format.
        """
        root = record.run.root
        try:
            sweep = Sweep.load(root)
        except StorageError as error:
            raise StorageError(record.clean(error.what), record.clean(error.ways_out)) from None
        sweep.trials = {number: _clean(record, trial) for number, trial in sweep.trials.items()}
        places = [
            record.run.at(artifacts.SWEEP),
            *(paths.join(root, trial.name, TRIAL) for trial in sweep.trials.values()),
        ]
        fs, _ = paths.filesystem(root)
        infos = fs.get_file_info([paths.filesystem(place)[1] for place in places])
        times = [info.mtime_ns / 1e9 for info in infos if info.mtime_ns]
        return cls(record, sweep, max(times, default=None))

    @cached_property
    def trials(self) -> list[Trial]:
        """The best first, then those that never reported or failed."""
        ranked = self.sweep.ranked()
        numbers = {trial.number for trial in ranked}
        return [*ranked, *(trial for trial in by_number(self.sweep) if trial.number not in numbers)]

    @cached_property
    def best(self) -> Trial | None:
        return self.sweep.best()

    @property
    def metric(self) -> str:
        return self.sweep.metric

    @property
    def space(self) -> dict[str, dict[str, Any]]:
        found = self.record.setting("tune.space")
        return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}

    @property
    def planned(self) -> int | None:
        """Trials that there are to be; None where a grid decides it."""
        return self.record.setting("tune.trials") or (None if self.record.setting("tune.search") == "grid" else TRIALS)

    @cached_property
    def kind(self) -> str:
        """Where it stands, as of `reading.State`."""
        trials = self.sweep.trials.values()
        if trials and all(trial.over for trial in trials) and len(trials) >= (self.planned or 0):
            return "complete"
        if self.written is not None and time.time() - self.written < LEAST_QUIET:
            return "training"
        # Trials that evaluate seldom report seldom: their own metrics tell whether they go on.
        running = [self.sweep.run_of(trial) for trial in trials if trial.status == "running"]
        alive = any(paths.exists(run.recipe) and Record.read(run.root).state.kind == "training" for run in running)
        return "training" if alive else "stopped" if trials else "new"

    @property
    def words(self) -> str:
        over = sum(trial.over for trial in self.sweep.trials.values())
        of = f"{over:,} of {max(self.planned or 0, len(self.sweep.trials)):,} trials over"
        return {
            "complete": f"complete: {over:,} trials",
            "training": f"running: {of}",
            "stopped": f"stopped: {of}",
            "new": "no trial yet",
        }[self.kind]

    def rest(self, trial: Trial) -> float:
        """Device-seconds that the trial would still have taken to its end, at its own speed."""
        last = trial.reports[-1] if trial.reports else None
        return last.seconds * trial.workers * (1 / last.progress - 1) if last and last.progress > 0 else 0.0


def _clean(record: Record, trial: Trial) -> Trial:
    """A trial whose strings hold no credentials; those of reports stay as they are, also such as are not finite."""
    return dataclasses.replace(
        trial,
        settings=record.clean(trial.settings),
        first=record.clean(trial.first),
        error=None if trial.error is None else record.clean(trial.error),
        inherited=[dataclasses.replace(one, settings=record.clean(one.settings)) for one in trial.inherited],
    )
