"""What happens in a sweep, as Ray Tune tells it: into the journal, onto the table, and what is then to be deleted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Stopper

from ray_ft.recipe import Tune
from ray_ft.tune import inherit, prune
from ray_ft.tune.journal import Inherited, Report, Sweep, Trial
from ray_ft.tune.proposals import Slots
from ray_ft.tune.schedule import PROGRESS, STEP
from ray_ft.tune.table import Table
from ray_ft.tune.trial import pointer

SAVE_EVERY = 10.0  # seconds between writes of what changes all the time


class NotKept:
    """Ray Tune pickles what it is given into snapshots, which nothing reads: of these objects it keeps nothing."""

    def __reduce__(self) -> Any:
        return object, ()


class Watch(NotKept, tune.Callback):
    """Writes the journal. Ray Tune calls it from its own loop, in this process."""

    def __init__(self, sweep: Sweep, table: Table, section: Tune, keep_saved: int, slots: Slots, door: Any) -> None:
        self._sweep, self._table, self._section, self._keep_saved = sweep, table, section, keep_saved
        self._slots, self._door = slots, door
        self._to_prune = False
        self._taking: dict[int, str] = {}  # number → another trial's checkpoint, which it is about to copy
        self._pointers: dict[str, dict[str, Any]] = {}  # what Ray Tune's checkpoints say, by their paths
        if section.scheduler == "pbt":
            unfinished = [trial for trial in sweep.trials.values() if not trial.over]
            pending = {trial.number: inherit.pending(sweep.run_of(trial)) for trial in unfinished}
            self._taking = {number: taken["checkpoint"] for number, taken in pending.items() if taken}
        self._earlier = {number: trial.seconds for number, trial in sweep.trials.items()}  # before this start
        self._before: dict[int, float] = {}  # each trial's seconds when its process started
        self._began, self._ran, self._saved = time.monotonic(), sweep.seconds, 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        self._before[record.number] = record.seconds
        self._now(record, "running", "started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self._record(trial)
        record.seconds = self._before[record.number] + result["seconds"]
        self._sweep.seconds = self._ran + time.monotonic() - self._began
        if took := result.get("inherited"):
            record.took_over(Inherited.of(took))
            self._taking[record.number] = took["checkpoint"]
            # The run knows from now on; of Ray Tune it would take over again, should its process die.
            trial.run_metadata.checkpoint_manager._latest_checkpoint_result = None
            self._now(record, "running", "inherited")
        if result.get("alive"):
            self._table.alive(record, result["alive"])
        if self._section.metric in result:
            self._taking.pop(record.number, None)
            value = result[self._section.metric]
            record.reported(Report(result[STEP], result["total"], value, record.seconds))
            self._now(record, "running", "reported")
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._sweep.save()
            self._saved = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record, last = self._record(trial), trial.last_result
        if last.get("interrupted"):  # the sweep ends; it stays as it is, for --resume
            self._sweep.save_trial(record)
            return
        self._taking.pop(record.number, None)
        if why := last.get("failed"):
            record.error = why
            self._now(record, "failed", "failed")
        elif last.get(PROGRESS, 0) >= 1:
            self._now(record, "finished", "finished")
        else:
            self._now(record, "stopped", "stopped")
        self._to_prune = True

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        record.error = _why(trial)
        self._taking.pop(record.number, None)
        self._now(record, "failed", "failed")
        self._to_prune = True

    def close(self) -> None:
        """Write what is only known when all have left: for how long each trial held its place."""
        for number, seconds in ray.get(self._door.seconds.remote()).items():
            record = self._sweep.trials[number]
            record.seconds = self._earlier.get(number, 0.0) + seconds
            self._sweep.save_trial(record)
        self.prune()

    def prune(self, trials: Sequence[Any] = ()) -> None:
        """Delete what losers saved, once they have left: one that is on its way out may still save.

        Args:
            trials: of Ray Tune, as long as it runs.
        """
        inside = ray.get(self._door.inside.remote())
        needed = {standing["checkpoint"] for standing in self._standing(trials).values()}
        needed.update(self._taking.values())
        prune.losers(self._sweep, self._section.keep, self._table.line, needed, inside)
        self._to_prune = any(self._sweep.trials[number].over for number in inside)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        record.status = "waiting"
        self._table.line(f"trial {record.name} starts again where it stands: {_why(trial)}")

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        standing = self._standing(trials)
        needed = {one["checkpoint"] for one in standing.values()} | {*self._taking.values()}
        # While a trial copies another one's checkpoint, what is the newest of its own says nothing.
        taking = {*self._taking, *(number for number, one in standing.items() if one["trial"] != number)}
        prune.superseded(self._sweep, self._keep_saved, needed, self._table.line, taking)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._slots.count(trials)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._to_prune:
            self.prune(trials)
        for trial in trials:
            if trial.status == "PAUSED" and (record := self._record(trial)).status == "running":
                self._now(record, "paused", "paused")

    def _record(self, trial: Any) -> Trial:
        return self._sweep.trials[trial.config["trial"]["number"]]

    def _standing(self, trials: Sequence[Any]) -> dict[int, dict[str, Any]]:
        """Of a population: number → what a trial that is not over would go on from, as `pointer` has it."""
        found = {}
        for trial in trials if self._section.scheduler == "pbt" else ():
            if not trial.is_finished() and trial.checkpoint is not None:
                if trial.checkpoint.path not in self._pointers:
                    with trial.checkpoint.as_directory() as folder:
                        self._pointers[trial.checkpoint.path] = pointer(folder)
                found[self._record(trial).number] = self._pointers[trial.checkpoint.path]
        return found

    def _now(self, record: Trial, status: Any, event: Any) -> None:
        record.status = status
        self._sweep.save_trial(record)
        if event == "reported" or record.over:
            self._sweep.save()
        self._table.changed(record, event)


def _why(trial: Any) -> str:
    """What Ray Tune says of a trial that it lost, in a line; training's own errors do not come this way."""
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError):  # there is none
        lines = []
    causes = [line for line in lines if line[:1].strip() and "Error" in line]
    return (causes or ["its process died"])[-1][:300]


class Limits(NotKept, Stopper):
    """Ends the sweep when its budget is spent, or it is told to: trials save and leave before Ray Tune ends them.

    Args:
        told: whether the sweep is to end, such as by a signal.
        door: the actor of `places.place`.
    """

    def __init__(self, sweep: Sweep, section: Tune, told: Callable[[], bool], slots: Slots, door: Any) -> None:
        self._sweep, self._budget = sweep, section.budget
        self._told, self._slots, self._door = told, slots, door
        self._began, self._ran = time.monotonic(), sweep.seconds
        self.why: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.why is None and (why := self._spent()):
            self.why, self._slots.closed = why, True
            ray.get(self._door.end.remote())
        return self.why is not None and not ray.get(self._door.inside.remote())

    def _spent(self) -> str | None:
        if self._told():
            return "stopped"
        hours = (self._ran + time.monotonic() - self._began) / 3600
        devices = self._sweep.device_seconds / 3600
        if self._budget.wall_hours is not None and hours >= self._budget.wall_hours:
            return f"tune.budget.wall_hours = {self._budget.wall_hours:g} are spent"
        if self._budget.gpu_hours is not None and devices >= self._budget.gpu_hours:
            return f"tune.budget.gpu_hours = {self._budget.gpu_hours:g} are spent"
        return None
