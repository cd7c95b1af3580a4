"""A recipe with a `tune` section to a finished sweep: check, prepare, run the trials, write what came out."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ft import artifacts, doctor, paths, recipe, session
from ray_ft.errors import RecipeError, StorageError, TrainingError
from ray_ft.placement import capacity
from ray_ft.recipe import Recipe, Tune
from ray_ft.tune import results, space
from ray_ft.tune.journal import Inherited, Sweep, Trial
from ray_ft.tune.table import Table
from ray_ft.tune.watch import Limits, NotKept, Watch
from ray_ft.view import View

RESTARTS = 3  # of a trial whose process or node died; what its own workers survive, train.failures says

#: Ray Tune's own files, which nothing reads: the journal has all that a sweep goes on from.
SCRATCH = "ray"

LOCK = "sweep.lock"

#: May differ when a sweep is resumed: how long it goes on, and how.
MAY_CHANGE = ("trials", "budget", "concurrency", "keep")

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # of each trial, to files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are handled here
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # results without the metric say that a trial lives
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its pickled snapshots
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended. `why`: what ended it before its time, or None; `signal`: where that was one."""

    sweep: Sweep
    best: Trial | None
    why: str | None
    signal: int | None


def tune(base: Recipe, view: View, *, resume: bool = False) -> Outcome:
    """Run the sweep of a recipe's `tune` section.

    Args:
        resume: go on with the sweep of this name; trials that are over are not run again.

    Raises:
        RecipeError: the section does not make a sweep, with every fault found; nothing has been started.
        ResourceError: not even one trial fits the cluster, whatever it may grow to.
        StorageError: there is a sweep of this name already, or none to resume.
        DataError, ModelError: as training would raise them.
        TrainingError: every trial failed.
    """
    checked = space.check(base)
    assert base.tune is not None
    if not resume:
        _check_new(base)
    with _alone(base.run.dir.root), session.connected():
        begun = _resumed(base) if resume else None
        outcome = _Runner(base, base.tune, checked, begun, view).run()
    sweep = outcome.sweep
    if sweep.trials and all(trial.status == "failed" for trial in sweep.trials.values()):
        first = min(sweep.trials.values(), key=lambda trial: trial.number)
        raise TrainingError(
            f"all {len(sweep.trials)} trials failed; trial {first.name}: {(first.error or '').splitlines()[0]}",
            [f"each trial's settings and error: {sweep.root}", "train the recipe alone first: ray-ft train RECIPE"],
        )
    return outcome


@contextlib.contextmanager
def _alone(root: str) -> Iterator[None]:
    """Let no other command run this sweep meanwhile: both would write its journal. Object stores have no locks.

    Raises:
        StorageError: another one does.
    """
    if paths.is_uri(root):
        yield
        return
    os.makedirs(root, exist_ok=True)
    file = paths.join(root, LOCK)
    with open(file, "w") as lock:  # stays; the kernel unlocks it, however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another command runs the sweep at {root}", ["wait for it, or stop it", f"see which: fuser {file}"]
            ) from error
        try:
            yield
        finally:
            if os.listdir(root) == [LOCK]:  # it was refused: nothing is left of it
                os.unlink(file)
                os.rmdir(root)


def _check_new(base: Recipe) -> None:
    root = base.run.dir.root
    if paths.exists(paths.join(root, artifacts.SWEEP)):
        raise StorageError(
            f"there is a sweep at {root} already",
            ["go on with it: --resume", "begin another: run.name=…", f"or delete {root}"],
        )
    if paths.exists(base.run.dir.recipe):
        raise StorageError(f"{root} holds a training run", ["give the sweep another name: run.name=…"])
    paths.probe_writable(base.run.storage)


def _resumed(base: Recipe) -> Sweep:
    sweep = Sweep.load(base.run.dir.root)
    # It is written last: without it the sweep was killed before anything else was there.
    before = recipe.load(base.run.dir.recipe) if paths.exists(base.run.dir.recipe) else base
    if changes := list(_changes(_fixed(before), _fixed(base))):
        raise RecipeError(
            f"the sweep at {sweep.root} was begun with another recipe: {'; '.join(changes)}",
            ["put it back to go on with the sweep", "begin another: run.name=… without --resume"],
        )
    base.save()
    if base.tune and base.tune.scheduler == "pbt":
        _hear_of_intentions(sweep)
    return sweep


def _hear_of_intentions(sweep: Sweep) -> None:
    """Trials may have begun to take over from others without the journal's having heard of it."""
    from ray_ft.tune import inherit

    for trial in sweep.trials.values():
        if not trial.over and (taken := inherit.pending(sweep.run_of(trial))) is not None:
            trial.took_over(Inherited.of(taken))
            sweep.save_trial(trial)


def _fixed(one: Recipe) -> dict[str, Any]:
    content = one.model_dump(mode="json")
    for key in MAY_CHANGE:
        content["tune"].pop(key)
    return content


def _changes(before: Any, now: Any, key: str = "") -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key} was {before!r}, is {now!r}"


class _Recorder(NotKept):
    """Writes a new trial into the journal."""

    def __init__(self, sweep: Sweep, base: Recipe) -> None:
        self._sweep, self._base = sweep, base

    def __call__(self, number: int, settings: dict[str, Any]) -> None:
        one = _recipe(self._base, number, settings) or self._base
        self._sweep.save_trial(Trial(number, settings, one.train.world_size))


def _recipe(base: Recipe, number: int, settings: dict[str, Any]) -> Recipe | None:
    """A trial's recipe; None where its settings make none: it fails by itself, and says why."""
    from ray_ft.tune.trial import trial_recipe

    with contextlib.suppress(RecipeError):
        return trial_recipe(base, number, settings)
    return None


def _resources(base: Recipe, cuda: bool, config: dict[str, Any]) -> Any:
    """Of a trial's own actor: of the whole trial where it trains there, next to nothing where workers do."""
    from ray.tune import PlacementGroupFactory

    train = (_recipe(base, config["trial"]["number"], config["trial"]["settings"]) or base).train
    if not train.in_process:
        return PlacementGroupFactory([{"CPU": 0.001}])
    return PlacementGroupFactory([{"CPU": train.cpus_per_worker, **({"GPU": 1} if cuda else {})}])


class _Runner:
    """One start of a sweep, on the connected cluster.

    Args:
        begun: what is resumed; None: a new one is begun, once it is known that it can run.
    """

    def __init__(self, base: Recipe, section: Tune, checked: space.Space, begun: Sweep | None, view: View) -> None:
        self._recipe, self._section, self._space, self._begun, self._view = base, section, checked, begun, view
        self._base = base
        self._signal: int | None = None

    def run(self) -> Outcome:
        from ray_ft.train import launch
        from ray_ft.tune import search

        total = launch.steps(self._base, self._view)  # prepares the data, once for all trials
        settings = search.planned(self._space, self._section)
        nodes = capacity.cluster(self._view.line)
        self._cuda = capacity.on_gpus(self._base, nodes)
        if self._cuda and self._base.train.device == "auto":  # GPUs may still be on their way when a trial asks
            on_gpus = self._base.train.model_copy(update={"device": "cuda"})
            self._base = self._base.model_copy(update={"train": on_gpus})
        at_once = capacity.trials_at_once(self._needs(settings), nodes, self._section.concurrency)
        doctor.quick(self._base, self._view)
        self._sweep = self._begun or Sweep.create(self._recipe)
        self._plan(settings)
        count = len(settings) if settings is not None else self._wanted
        # Where fewer are wanted than were begun, those beyond stay as they are.
        waiting = [trial for number, trial in self._sweep.trials.items() if not trial.over and number < count]
        over = sum(trial.over for trial in self._sweep.trials.values())
        self._view.line(
            f"{self._base.run.name}: {count} trials of {total} steps, {at_once} at once"
            + (f", {over} of them over already" if self._sweep.seconds else "")
        )
        why = None
        if waiting or len(self._sweep.trials) < count:
            why = self._fit(settings, waiting, at_once, total)
        self._finish()
        return Outcome(self._sweep, self._sweep.best(), why, self._signal)

    @property
    def _wanted(self) -> int:
        """Trials of a search that has no end of its own."""
        assert self._section.wanted is not None
        return self._section.wanted

    def _plan(self, settings: Sequence[dict[str, Any]] | None) -> None:
        """Write down every trial that is known before any runs."""
        record = _Recorder(self._sweep, self._base)
        for number, one in enumerate(settings or ()):
            if number not in self._sweep.trials:
                record(number, one)

    def _needs(self, settings: Sequence[dict[str, Any]] | None) -> list[capacity.Need]:
        known = settings if settings is not None else [self._space.draw(number) for number in range(self._wanted)]
        recipes = [one for number, each in enumerate(known) if (one := _recipe(self._base, number, each))]
        return list({capacity.Need.of(one, self._cuda) for one in recipes or [self._base]})

    def _fit(
        self, settings: Sequence[dict[str, Any]] | None, waiting: list[Trial], at_once: int, total: int
    ) -> str | None:
        """Run what is not over yet. Returns what ended the sweep before its time."""
        os.environ.update(_ENVIRONMENT)
        from ray import tune as ray_tune

        from ray_ft.tune import places, proposals, schedule, search
        from ray_ft.tune.trial import Context
        from ray_ft.tune.trial import Trial as Trainable

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        known = list(self._sweep.trials.values())
        door = places.place(at_once)
        # Of a population every report counts: it is compared by it, also where it takes steps again.
        reported = {} if self._section.scheduler == "pbt" else {trial.number: trial.step for trial in waiting}
        context = Context(self._base, reported, door)
        slots = proposals.Slots(at_once)
        left = len(waiting) + (max(self._wanted - len(known), 0) if settings is None else 0)
        expected = left + len([trial for trial in known if trial.over])
        table = Table(self._sweep, self._view, expected, self._section)
        scheduler = schedule.make(self._space, self._section, total, known, expected, slots)
        unfinished = proposals.Known(waiting, slots, getattr(scheduler, "rungs", None), self._drop)
        metric, mode = self._section.metric, self._section.mode
        source: Any = proposals.Planned(unfinished, metric, mode)
        if settings is None:
            record = _Recorder(self._sweep, self._base)
            source = search.TPE(self._space, self._section, known, unfinished, len(known), record)
        watch = Watch(self._sweep, table, self._section, self._base.train.checkpoint.keep, slots, door)
        limits = Limits(self._sweep, self._section, lambda: self._signal is not None, slots, door)
        scratch = paths.join(self._sweep.root, SCRATCH)
        resources = functools.partial(_resources, self._base, self._cuda)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(Trainable, context=context), resources),
            tune_config=ray_tune.TuneConfig(
                search_alg=proposals.Proposals(source, slots, left),
                scheduler=scheduler,
                num_samples=max(left, 1) + 1,  # the searcher says itself when there are no more
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=scratch,
                stop=limits,
                verbose=0,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),  # its default for classes
                failure_config=ray_tune.FailureConfig(max_failures=RESTARTS),
                callbacks=[watch],
            ),
        )
        try:
            with table.shown(), session.handling(self._told(table)), warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.tune")
                tuner.fit()
        finally:
            watch.close()
            self._sweep.save()
            with contextlib.suppress(OSError):
                paths.delete_dir(scratch)
        return limits.why

    def _drop(self, trial: Trial) -> None:
        """Of a resumed sweep: others have overtaken a trial that waited."""
        trial.status = "stopped"
        self._sweep.save_trial(trial)

    def _told(self, table: Table) -> Any:
        def handler(number: int, _: Any) -> None:
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            table.line("stopping: running trials save first; Ctrl-C again to stop at once; --resume goes on")

        return handler

    def _finish(self) -> None:
        self._sweep.save()
        results.write_table(self._sweep)
        results.write_best(self._sweep, self._recipe)
