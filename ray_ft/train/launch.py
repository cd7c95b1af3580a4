"""A recipe to a finished run: check, prepare, start the workers on Ray Train (or none), show, wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ray_ft import doctor, paths, placement, session
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.data.prepare import Prepared, Split, check, prepare
from ray_ft.errors import DataError, ResourceError, first_line
from ray_ft.placement.nodes import is_connected
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout
from ray_ft.train import cluster, objective, references, worker
from ray_ft.train.asks import Ask, Restart
from ray_ft.train.board import Message
from ray_ft.train.keeper import METRICS
from ray_ft.train.metrics import MetricsLog
from ray_ft.train.schedule import total_steps
from ray_ft.view import View

#: Seconds for which a second Ctrl-C waits for an orderly end: a little longer than the controller's longest usual wait.
CANCEL_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps finished of `total`, of which `taken` now; seconds to the end and to the first step.

    `signal` is the one that ended it before its time, or None.
    """

    finished: int
    total: int
    taken: int
    seconds: float
    first_step_seconds: float | None
    signal: int | None = None

    @property
    def complete(self) -> bool:
        return self.finished >= self.total


class Companion(Protocol):
    """What goes on beside a run, such as validation. Training waits for none of the calls but the last.

    A call that fails is said in a line, and the run goes on without.
    """

    def started(self, say: Callable[[str], None]) -> None:
        """The run is about to begin; `say` takes lines for people, from any thread."""

    def resumed(self) -> None:
        """The workers have what they need: for the first time, or again."""

    def paused(self) -> None:
        """The workers are gone: whatever this holds of the cluster, they may need to come back."""

    def logged(self, row: dict[str, float], total: int) -> None:
        """A row of metrics came, of a run of `total` steps."""

    def ended(self, complete: bool) -> None:
        """The workers are gone for good; the command waits for this call. `complete`: no step is left to take."""


def train(
    recipe: Recipe,
    view: View,
    beside: Sequence[Companion] = (),
    asked: Callable[[], Ask] = lambda: Ask.NOTHING,
    examined: bool = False,
) -> Outcome:
    """Train the recipe, or continue it where it stands.

    Args:
        beside: is told of the run as it goes on; not where nothing is left to train.
        asked: says STOP or DROP, beside signals, where the run should end; called often, from another thread.
        examined: whoever calls has looked at the cluster already, as a sweep does for all its trials.

    Raises:
        RayFtError: of the kind that says what is wrong: storage, resources, data, model, checkpoint or training.
    """
    began = time.monotonic()
    if recipe.train.in_process:
        job = prepare_job(recipe, view, stream.in_process)
        return _Monitor(job, view, began, beside, asked).watch(_in_process)
    fewest = recipe.train.sizes[0]
    # A cluster's nodes may be on their way: train.failures.wait_seconds. This machine grows no CPUs.
    joins = session.address() or is_connected()
    with session.connected(0 if joins else fewest, recipe.train.cpus_per_worker):
        placement.refuse_impossible(recipe, view.line)
        if not examined:
            stream.start_helpers()  # they come up meanwhile
            doctor.quick(recipe, view)
        job = prepare_job(recipe, view, stream.spread)
        return _Monitor(job, view, began, beside, asked).watch(cluster.run)


def steps(recipe: Recipe, view: View) -> int:
    """Steps that the recipe trains for; its data is prepared, or found prepared."""
    spread = stream.in_process if recipe.train.in_process else stream.spread
    return total_steps(recipe, prepare_data(recipe, view, spread).order)


def prepare_job(recipe: Recipe, view: View, spread: Any) -> worker.Job:
    """Prepare the recipe's data, write what was counted into the run directory, and refuse what is not fit to train on.

    Raises:
        DataError: see `prepare` and `check`.
        CheckpointError: the run of this name was trained on other data; nothing of it has been touched.
    """
    run = recipe.run.dir
    job = prepare_data(recipe, view, spread)
    job.start()
    paths.write_json(run.stats, {split: found.stats() for split, found in job.splits.items()})
    with paths.Appender(run.rejects) as rejects:
        for found in job.splits.values():
            rejects.write_file(found.rejects)  # as many as there are bad rows: not through memory
    for split, found in job.splits.items():
        check(found, recipe, split, run.rejects)
        view.line(f"{split} data{' (prepared before)' if found.reused else ''}: {found.summary()}")
        if said := found.counts.say_labels(recipe.model.labels):
            view.line(f"{split} labels: {said}")
    if not job.order.rows:
        weights = ", ".join(
            f"{source.weight:g} × {job.train.rows_by_source.get(number, 0)} packed rows"
            for number, source in enumerate(recipe.data.train)
        )
        raise DataError(
            f"the weights of data.train leave no row to train on: {weights}",
            ["larger weights", "more train.epochs", "more rows"],
        )
    for line in job.order.passes_lines(total_steps(recipe, job.order) * recipe.train.global_batch):
        view.line(line)
    return refer(job, view, spread is stream.in_process) if recipe.data.task == "preference" else job


def refer(job: worker.Job, view: View, in_process: bool) -> worker.Job:
    """A job on pairs with the reference that they are judged by, and a line that says which."""
    if objective.reference_of(job.recipe) == "adapter off":
        view.line(references.SWITCHED_OFF)
        return job
    view.line("reference: the base, whose log-probabilities of all answers are computed once and kept beside the rows")
    gpus = None if in_process else references.gpus_for(job.recipe)
    found = {}
    for split, prepared in job.splits.items():
        with view.progress(f"asking the base about {split} data") as progress:
            found[split] = references.with_references(prepared, job.recipe, gpus=gpus, on_progress=progress)
    return replace(job, train=found["train"], held_out=found.get("eval"))


def prepare_data(recipe: Recipe, view: View, spread: Any) -> worker.Job:
    """Prepare the recipe's data, or find it prepared; the run's directory is not touched."""
    paths.probe_writable(recipe.run.storage)
    folder = recipe.model.folder(weights=False)
    prepared: dict[Split, Prepared] = {}
    splits: list[Split] = ["train", "eval"] if recipe.data.eval else ["train"]
    for split in splits:
        with view.progress(f"preparing {split} data") as progress:
            prepared[split] = prepare(recipe, split, folder, spread, progress)
    return worker.Job(recipe, prepared["train"], prepared.get("eval"))


class _Monitor:
    """Runs the workers in a thread and shows what they report; Ctrl-C and SIGTERM end it with a checkpoint."""

    def __init__(
        self,
        job: worker.Job,
        view: View,
        began: float,
        beside: Sequence[Companion] = (),
        asked: Callable[[], Ask] = lambda: Ask.NOTHING,
    ) -> None:
        self.job, self._view, self._began, self._beside, self._asked = job, view, began, beside, asked
        self._signal: int | None = None
        self._first: float | None = None
        self._lost: float | None = None  # when a failure was heard of
        self._cancel: Callable[[], None] = lambda: None
        self._total = total_steps(job.recipe, job.order)

    def watch(self, start: Any) -> Outcome:
        recipe, run = self.job.recipe, self.job.recipe.run.dir
        found = self.job.start(lambda aside, why: self._view.line(f"set aside {aside}: {why}"))
        recipe.save()  # not before the run is known to go on with it: a refused one must not replace its own
        at = found.step if found else 0
        if at >= self._total:
            self._view.line(f"{recipe.run.name} is already trained: {at} of {self._total} steps")
            return Outcome(at, self._total, 0, time.monotonic() - self._began, None)
        if found:
            self._view.line(f"resuming {recipe.run.name} at step {at} of {self._total} from {found.location}")
        self._log = MetricsLog(run, at, found.state.get(METRICS, []) if found else [])
        done: list[int] = []
        failed: list[BaseException] = []
        over = threading.Event()

        def body() -> None:
            try:
                done.append(start(self.job, self))
            except BaseException as error:  # carried to the main thread, which raises it
                failed.append(error)
            finally:
                over.set()

        thread = threading.Thread(target=body, name="ray-ft-train", daemon=True)
        try:
            # A live panel would draw over a debugger's prompt.
            with self._view.training(self._total, at, plain=recipe.train.in_process) as self._panel:
                self._tell(lambda one: one.started(self.say))
                thread.start()
                self._wait(over)
        except KeyboardInterrupt:
            if recipe.train.in_process:  # Python cannot end while the other thread computes: it would abort
                self._view.line("stopped at once; the same command continues at the newest checkpoint")
                self._recording(self._log.close)
                os._exit(128 + signal.SIGINT)
            self._cancel()
            with session.handling(signal.SIG_IGN):
                thread.join(CANCEL_SECONDS)
            if thread.is_alive():  # it waits for Ray, and Ray would end this process if it were shut down meanwhile
                self._recording(self._log.close)
                session.abandon(128 + signal.SIGINT)
            raise
        finally:
            self._recording(self._log.close)
            self._tell(lambda one: one.ended(bool(done) and done[0] >= self._total))
        if failed and not (self.asked() and isinstance(failed[0], ResourceError)):  # stopped while it waited
            raise failed[0]
        done = done or [at]
        seconds = time.monotonic() - self._began
        return Outcome(done[0], self._total, done[0] - at, seconds, self._first, self._signal)

    def _wait(self, over: threading.Event) -> None:
        """Until the thread is over. SIGTERM, which schedulers and `ray job stop` send, asks for the same as Ctrl-C."""
        came: list[int] = []
        told = 0.0
        with session.handling(lambda number, _: came.append(number)):
            # Not by joining the thread: Python 3.11 takes one for ended once a signal has interrupted join().
            while not over.wait(0.2):
                if came and self._signal is None:
                    self._signal, told = came[0], time.monotonic()
                    came.clear()
                    self._view.line("stopping after this step, with a checkpoint; Ctrl-C again to stop at once")
                # Schedulers repeat SIGTERM, and a terminal's Ctrl-C can reach a process twice.
                if signal.SIGINT in came and time.monotonic() - told > 1:
                    raise KeyboardInterrupt
                came.clear()

    # What the workers report, and what they are asked.

    def take(self, messages: list[Message]) -> None:
        report: dict[str, Callable[[Any], None]] = {
            "line": self.say,
            "lost": self.lost,
            "row": self.log,
            "begin": lambda content: self.begin(*content),
        }
        for kind, content in messages:
            report[kind](content)

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        """Training goes on after `step` steps: for the first time, or after a failure, from a checkpoint."""
        if self._lost is not None:
            away = time.monotonic() - self._lost
            self._view.line(
                f"training goes on at step {step} of {self._total} with {workers} worker{'s' * (workers > 1)} "
                f"after {away:.0f} s (model in {model_seconds:.1f} s)"
            )
        self._lost = None
        self._recording(lambda: self._log.rewind(step, rows))
        self._tell(lambda one: one.resumed())

    def can_cancel(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def lost(self, why: str) -> None:
        """The workers are gone; `begin` follows if they come back."""
        self._view.line(why)
        self._lost = self._lost or time.monotonic()
        self._tell(lambda one: one.paused())

    def say(self, line: str) -> None:
        """Takes a line for people from the workers."""
        self._view.line(line)

    def log(self, row: dict[str, float]) -> None:
        """Takes a row of metrics from the workers."""
        if self._first is None:
            self._first = time.monotonic() - self._began
        self._panel.update(row)
        self._recording(lambda: self._log.add(row))
        if "checkpoint_seconds" in row:
            self._recording(self._log.flush)
        self._tell(lambda one: one.logged(row, self._total))

    def _recording(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:  # the training itself may still reach its storage; losing it over a log would be worse
            self._view.line(f"metrics could not be written: {error}")

    def _tell(self, what: Callable[[Companion], None]) -> None:
        for one in self._beside:
            try:
                what(one)
            except Exception as error:
                self.say(f"{type(one).__name__} beside the training failed: {first_line(error)}; training goes on")

    def asked(self) -> Ask:
        """What is asked of the workers: to end, by a signal or by whoever started the run."""
        return max(self._asked(), Ask.NOTHING if self._signal is None else Ask.STOP)


def _in_process(job: worker.Job, monitor: _Monitor) -> int:
    recipe = job.recipe
    cuda = recipe.train.device == "cuda" or (recipe.train.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ResourceError("train.device = 'cuda', and this machine has no usable GPU", ["train.device=cpu"])
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    layout = Layout(0, 1, device, cluster.compute_dtype(recipe, cuda))
    alone = replace(job, recipe=recipe.sized(0))  # there is nobody to share the shards with

    def batches(order: Order, start: int, total: int) -> Any:
        rows = recipe.train.global_batch
        return stream.local_batches(order, start * rows, total * rows, 0, 1, rows)

    while True:
        try:
            return worker.run(alone, job.start(), layout, batches, monitor)
        except Restart as restart:
            monitor.say(f"starting again: {restart}")
