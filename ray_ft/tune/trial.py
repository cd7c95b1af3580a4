"""One trial: an ordinary run, trained in an actor of Ray Tune, which hears of each evaluation and may end it.

With train.workers: 0 the loop runs in this very process, else on Ray Train's workers, started from here. What Ray Tune
takes for a trial's checkpoint is a small file that says where the run's own newest checkpoint lies.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from ray_ft import artifacts, paths, recipe
from ray_ft.errors import CheckpointError, RayFtError, RecipeError, first_line
from ray_ft.recipe import Recipe
from ray_ft.train import checkpoint
from ray_ft.train.asks import Ask
from ray_ft.train.metrics import read_metrics
from ray_ft.tune import inherit, places
from ray_ft.tune.journal import Inherited
from ray_ft.tune.schedule import PROGRESS, STEP, pbt_every
from ray_ft.tune.space import Space
from ray_ft.view import View

ALIVE_SECONDS = 1.0  # a trial is heard of at least so often, and hears so soon that the sweep ends
SAVE_SECONDS = 1800.0  # for which a checkpoint that is being written is waited for
POINTER = "checkpoint.json"


@dataclass(frozen=True)
class Context:
    """What all trials of a sweep share.

    Attributes:
        base: the sweep's recipe.
        reported: number → last step that was reported before this sweep was resumed.
        places: the actor of `places.place`.
    """

    base: Recipe
    reported: dict[int, int]
    places: Any


def run_dir(base: Recipe, number: int) -> artifacts.RunDir:
    """The run directory of a trial, below the sweep's."""
    return artifacts.RunDir(base.run.dir.at(artifacts.trial_name(number)))


def trial_recipe(base: Recipe, number: int, settings: dict[str, Any]) -> Recipe:
    """The recipe of a trial: the sweep's with its settings, in a run directory of its own, compared when it is due.

    Raises:
        RecipeError: the settings do not fit together.
    """
    content = Space(base).apply(settings)
    content["run"]["name"] = f"{base.run.name}/{artifacts.trial_name(number)}"
    content["evaluate"]["during"] = None  # answers beside the training would take from the other trials
    return recipe.parse(content, where=f"trial {artifacts.trial_name(number)}")


def due(base: Recipe, one: Recipe, total: int) -> Recipe:
    """A trial's recipe that evaluates, and for PBT saves, as often as its scheduler compares.

    Args:
        total: steps of the trial.
    """
    section = base.tune
    assert section is not None
    changed: dict[str, Any] = {}
    if section.scheduler == "pbt":
        every = pbt_every(section, total)
        # What another trial may go on from is deleted by the sweep, which knows that none will.
        saved = one.train.checkpoint.model_copy(update={"every": every, "keep": total})
        changed |= {"eval_every": every, "checkpoint": saved}
    else:
        shares = {"asha": section.asha.first, "median": section.median.first / 2, "none": 0.1}
        # Not rounded down: a report just before a rung does not count there, and the next is as far away again.
        every = max(math.ceil(total * shares[section.scheduler] - 1e-9), 1)
        changed["eval_every"] = one.train.eval_every or every
    changed["log_every"] = min(one.train.log_every, every)
    return one.model_copy(update={"train": one.train.model_copy(update=changed)})


class Trial(tune.Trainable):
    """Ray Tune's view of a trial. Every result has the seconds of this start; those with a metric are its reports."""

    def setup(self, config: dict[str, Any], context: Context) -> None:
        self._context, self._since = context, time.monotonic()
        self._number = int(config["trial"]["number"])
        self._settings = dict(config["trial"]["settings"])
        self._dir = run_dir(context.base, self._number)
        self._took: dict[str, Any] | None = None
        self._run: _Run | None = None
        self._reported = context.reported.get(self._number, 0)

    def step(self) -> dict[str, Any]:
        """The next report; without one for a moment, what is known of the trial now."""
        if self._run is None:
            self._run = _Run(self._context, self._number, self._settings, self._reported, self._since)
        result = self._run.next(ALIVE_SECONDS)
        if STEP in result:
            self._reported = max(self._reported, result[STEP])
        if self._took is not None:
            result["inherited"], self._took = self._took, None
        return result

    def save_checkpoint(self, folder: str) -> None:
        """Say where the run stands: at its first checkpoint that is not before the step that was reported last.

        A population's trials save as often as they are compared, and go on; others are only saved to make way.
        """
        section, run = self._context.base.tune, self._run
        if run is not None and section is not None and section.scheduler != "pbt":
            run.end(Ask.STOP)
        elif run is not None:
            run.go_on()  # what is written in the background is committed in a later step
        step, location = saved(self._dir, self._reported, lambda: run is None or run.over)
        content = {"trial": self._number, "step": step, "checkpoint": location}
        Path(folder, POINTER).write_text(json.dumps(content))

    def load_checkpoint(self, folder: str) -> None:
        """Take over the checkpoint of another trial; of its own the run knows by itself."""
        content = pointer(folder)
        self._reported = content["step"]
        if content["trial"] != self._number:
            inherited = Inherited(content["step"], content["trial"], self._settings)
            self._took = {**asdict(inherited), "checkpoint": content["checkpoint"]}
            inherit.intend(self._dir, self._took)  # from now on it holds, also where the sweep is killed

    def cleanup(self) -> None:
        if self._run is not None:
            self._run.end()


def pointer(folder: str) -> dict[str, Any]:
    """What `Trial.save_checkpoint` wrote: trial, step and checkpoint (its location)."""
    return json.loads(Path(folder, POINTER).read_text())


def saved(run: artifacts.RunDir, step: int, over: Callable[[], bool]) -> tuple[int, str]:
    """Step and location of the first checkpoint of `step` or later, once it is there: it may be on its way to storage.

    Args:
        over: whether the training is, so that no other checkpoint comes.

    Raises:
        CheckpointError: it does not come.
    """
    until = time.monotonic() + SAVE_SECONDS
    while True:
        last = over() or time.monotonic() > until  # asked before looking: what it saved in the end is there then
        if found := [one for one in checkpoint.committed(run.checkpoints) if one[0] >= step]:
            return found[0]
        if last:
            break
        time.sleep(0.2)
    raise CheckpointError(
        f"{run.checkpoints} has no checkpoint of step {step} or later",
        ["look whether storage takes it: the trial's logs/trial.txt", "go on with ray-ft tune --resume"],
    )


class _Run:
    """The training, in a thread of its own, and what it has to say. A companion of `launch.train`.

    Args:
        since: when this process started (monotonic).
    """

    def __init__(self, context: Context, number: int, settings: dict[str, Any], reported: int, since: float) -> None:
        self._context, self._number, self._settings, self._reported = context, number, settings, reported
        self._dir = run_dir(context.base, number)
        # Without workers this very process holds what it trains on, from its start on.
        self._began = since if context.base.train.in_process else None
        assert context.base.tune is not None
        self._metric = context.base.tune.metric
        # Of a population each report has a checkpoint, from which another trial may go on.
        self._population = context.base.tune.scheduler == "pbt"
        self._in_process = context.base.train.in_process
        self._asked = Ask.NOTHING
        self._reports: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: it is over
        self._alive: dict[str, Any] = {}
        self._outcome: dict[str, Any] = {}
        self._console = io.StringIO()
        self._over = threading.Event()
        self._heard = threading.Event()  # set: what was reported last does not end the trial
        threading.Thread(target=self._body, name="ray-ft-trial", daemon=True).start()

    def next(self, seconds: float) -> dict[str, Any]:
        import ray

        self.go_on()
        if ray.get(self._context.places.ending.remote()):
            self._asked = max(self._asked, Ask.STOP)
        result: dict[str, Any] | None = {"alive": dict(self._alive)}
        with contextlib.suppress(queue.Empty):
            result = self._reports.get(timeout=seconds)
        if result is None:
            result = {"alive": dict(self._alive), **self._outcome, "done": True}
        result["seconds"] = 0.0 if self._began is None else time.monotonic() - self._began
        return result

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way, and holds nothing."""
        return self._over.is_set()

    def end(self, asked: Ask = Ask.DROP) -> None:
        """End it, where it is not over; returns when all that it held is given back."""
        self._asked = asked
        self.go_on()
        self._over.wait()

    def _is_to_end(self) -> bool:
        return self._asked is not Ask.NOTHING

    def go_on(self) -> None:
        """Let the training go on after a report."""
        self._heard.set()

    def _body(self) -> None:
        try:
            with ExitStack() as stack:
                wait = places.held(self._context.places, self._number, self._is_to_end, self._began)
                if not stack.enter_context(wait):
                    self._outcome = {"interrupted": True}
                    return
                self._began = self._began or time.monotonic()
                self._outcome = self._train()
        except RecipeError as error:  # its faults are the reason, and its number of them is not
            self._outcome = {"failed": "\n".join(error.ways_out)}
        except RayFtError as error:
            self._outcome = {"failed": str(error)}
        except BaseException as error:  # of whatever kind: it is this setting's, and the sweep goes on
            self._console.write(traceback.format_exc())
            self._outcome = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        finally:
            self._keep_log()
            self._over.set()
            self._reports.put(None)

    def _train(self) -> dict[str, Any]:
        from ray_ft.train import launch

        one = trial_recipe(self._context.base, self._number, self._settings)
        run, self._in_process = one.run.dir, one.train.in_process
        if (taken := inherit.pending(run)) is not None:
            found = inherit.inherit(run, taken["checkpoint"])
            self._console.write(f"goes on from {taken['checkpoint']}, step {found.step}\n")
        view = View(Console(file=self._console, width=160, highlight=False))
        one = due(self._context.base, one, launch.steps(one, view))
        outcome = launch.train(one, view, [self], lambda: self._asked, examined=True)
        if not outcome.complete:
            return {"interrupted": True}
        last = next((row for row in reversed(read_metrics(run)) if self._metric in row), None)
        if last is None:
            return {"failed": f"{self._metric} was never reported: {run.metrics} has no such column"}
        return self._report(last, outcome.total)

    def _report(self, row: dict[str, Any], total: int) -> dict[str, Any]:
        return {
            self._metric: float(row[self._metric]),
            STEP: int(row["step"]),
            "total": total,
            PROGRESS: row["step"] / total,
            "alive": {**row, "total": total},
        }

    def _keep_log(self) -> None:
        if text := self._console.getvalue():
            where = self._dir.at("logs", "trial.txt")
            try:
                before = paths.read_text(where) if paths.exists(where) else ""
                paths.write_text(where, before + text)
            except OSError as error:  # the outcome is told all the same
                self._alive["log"] = first_line(error)

    # What launch tells.

    def started(self, say: Callable[[str], None]) -> None:
        pass

    def resumed(self) -> None:
        pass

    def paused(self) -> None:
        pass

    def logged(self, row: dict[str, float], total: int) -> None:
        self._alive = {**row, "total": total}
        comparable = self._metric in row and (not self._population or "checkpoint_seconds" in row)
        # The last one is told when the run is over, and its checkpoint is there.
        if comparable and self._reported < row["step"] < total:
            self._heard.clear()
            self._reports.put(self._report(row, total))
            # In process this is the training's own thread. One that is to end has nobody left who hears.
            if self._in_process and not self._is_to_end():
                self._heard.wait()

    def ended(self, complete: bool) -> None:
        pass
