"""What a person sees while a sweep runs: a live table on a terminal, a line per event elsewhere.

At most `ROWS` trials are in the table, the best and the running ones first; the others are counted. Settings that do
not fit are cut, then left out, the last of the space first: trial.json has them whole. The table is drawn by a thread
of its own, so it keeps copies of the trials that it was told of.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from ray_ft import paths
from ray_ft.recipe import Tune
from ray_ft.tune.columns import (
    Column,
    clock,
    fitting,
    grid,
    hours_text,
    number_text,
    packed,
    setting_text,
    short_names,
)
from ray_ft.tune.journal import Report, Sweep, Trial
from ray_ft.view import View

Event = Literal["started", "reported", "paused", "stopped", "finished", "failed", "inherited"]

ROWS = 20
OTHER_LINES = 9  # of the terminal's height: head lines, titles, what is not shown, and a few lines above the table
STATE_CELLS = 10  # of the bar, or of one word
NUMBER_CELLS = 7  # of a metric
NEWS = 0.1  # of its run that the best trial goes on before its next value is worth a line


class Table:
    """The state of a sweep's trials, told event by event.

    Args:
        planned: trials that there will be, where that is known.
    """

    def __init__(self, sweep: Sweep, view: View, planned: int | None, tune: Tune) -> None:
        self._sweep, self._view, self._planned, self._tune = sweep, view, planned, tune
        self._names = short_names(list(tune.space))
        self._began, self._before = time.monotonic(), sweep.seconds
        self._lock = threading.Lock()  # never held while something is printed: printing waits for the drawing thread
        self._trials = {number: _copy(trial) for number, trial in sweep.trials.items()}
        self._here: set[int] = set()  # told of in this start; others that are `running` were when a sweep was killed
        self._rows: dict[int, dict[str, float]] = {}
        self._former: dict[int, dict[str, Any]] = {}  # settings before they changed
        self._best = self._best_of([report.value for trial in sweep.trials.values() for report in trial.reports])
        self._news: tuple[int, float] | None = None  # trial and progress that were last printed as the best

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Live on a terminal for the duration of the block; its last state stays. Elsewhere nothing."""
        if not self._is_live:
            yield
            return
        with Live(get_renderable=self._render, console=self._view.console, refresh_per_second=4):
            yield

    def changed(self, trial: Trial, event: Event) -> None:
        """Take what is known of a trial now, its status included; where there is no table, print a line.

        A failure is printed above the table too, which has no room for its reason. A pause is not printed.
        """
        with self._lock:
            before = self._trials.get(trial.number)
            is_new = trial.number not in self._here
            self._take(trial)
            if before is not None and before.settings != trial.settings:
                self._former[trial.number] = before.settings
            if event in ("started", "paused", "inherited"):  # its newest row is of before
                self._rows.pop(trial.number, None)
        text = self._told(trial, event, is_new)
        if text is not None and (event == "failed" or not self._is_live):
            self.line(f"trial {trial.name} {text}")

    def alive(self, trial: Trial, row: Mapping[str, float]) -> None:
        """Take the newest row of metrics of a running trial, with `total` beside `step`."""
        with self._lock:
            self._take(trial)
            self._rows[trial.number] = {**self._rows.get(trial.number, {}), **row}  # an evaluation's has no rates

    def line(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._view.line(text)

    def _take(self, trial: Trial) -> None:
        self._here.add(trial.number)
        self._trials[trial.number] = _copy(trial)

    @property
    def _is_live(self) -> bool:
        return self._view.console.is_interactive

    # ---------------------------------------------------------------------------------------------------------- lines

    def _told(self, trial: Trial, event: Event, is_new: bool) -> str | None:
        last = trial.reports[-1] if trial.reports else None
        if event == "started":
            if not is_new:  # after a pause, or to take over
                return None
            return f"{'goes on' if last else 'started'}: {self._settings(trial.settings)}{self._state_of(last)}"
        if event == "reported" and last:
            return self._if_best(trial, last)
        if event == "stopped":
            return f"stopped by {self._tune.scheduler}{self._state_of(last)}{self._leader(trial)}"
        if event == "finished":
            best = ", the best so far" if last and last.value == self._best else ""
            return f"finished{self._state_of(last)}{best} ({clock(trial.seconds)})"
        if event == "failed":
            return f"failed with {self._settings(trial.settings)}: {_first(trial.error)}"
        if event == "inherited":
            return self._taken_over(trial)
        return None

    def _settings(self, settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{self._names.get(key, key)} {setting_text(value)}" for key, value in settings.items())

    def _state_of(self, last: Report | None) -> str:
        if last is None:
            return ""
        return f"; step {last.step} of {last.total}, {self._sweep.metric} {number_text(last.value)}"

    def _if_best(self, trial: Trial, report: Report) -> str | None:
        best = self._best_of([report.value] if self._best is None else [self._best, report.value])
        if best is None or best == self._best:
            return None
        self._best = best
        if self._news is not None and self._news[0] == trial.number and report.progress < self._news[1] + NEWS:
            return None
        if report.progress >= 1:  # it is told that it finished
            return None
        self._news = trial.number, report.progress
        return f"is the best so far{self._state_of(report)}"

    def _leader(self, trial: Trial) -> str:
        """Which trial had the best value where this one ended, if it was another one."""
        if not trial.reports:
            return ""
        end = trial.reports[-1].progress + 1e-9  # shares of runs of other lengths
        values: dict[int, float] = {}
        for other in self._trials.values():
            there = [report.value for report in other.reports if report.progress <= end]
            if there and other.reports[-1].progress >= end - 2e-9:
                values[other.number] = there[-1]
        best = self._best_of(list(values.values()))
        leader = next((number for number, value in values.items() if value == best), trial.number)
        if leader == trial.number:
            return ""
        return f"; {self._trials[leader].name} had {number_text(values[leader])} there"

    def _taken_over(self, trial: Trial) -> str:
        taken, former = trial.inherited[-1], self._former.get(trial.number, {})
        changes = [
            f"{self._names.get(key, key)} {f'{setting_text(former[key])} → ' if key in former else ''}"
            f"{setting_text(value)}"
            for key, value in taken.settings.items()
            if key not in former or former[key] != value
        ]
        parent = self._sweep.trials[taken.parent].name
        return f"takes over from {parent} after step {taken.step}: {', '.join(changes) or 'its settings stay'}"

    def _best_of(self, values: Sequence[float]) -> float | None:
        numbers = [value for value in values if not math.isnan(value)]
        if not numbers:
            return None
        return min(numbers) if self._sweep.mode == "min" else max(numbers)

    # ---------------------------------------------------------------------------------------------------------- table

    def _render(self) -> Group:
        with self._lock:
            trials, rows = dict(self._trials), dict(self._rows)
        width, height = self._view.console.size
        sweep = replace(self._sweep, trials=trials)
        shown = self._chosen(sweep, max(min(ROWS, height - OTHER_LINES), 3))
        parts: list[RenderableType] = [packed(self._head(sweep), width)]
        if shown:
            columns, best = fitting(*self._columns(shown, rows), width), sweep.best()
            parts.append(grid(columns, [self._style(trial, best) for trial in shown]))
        if rest := self._rest(sweep, shown):
            parts.append(packed([Text(rest, style="dim")], width))
        return Group(*parts)

    def _is_running(self, trial: Trial) -> bool:
        return trial.status == "running" and trial.number in self._here

    def _chosen(self, sweep: Sweep, room: int) -> list[Trial]:
        """At most `room` trials: those that are over, the best first, then those that run, are paused, and failed.

        Where there are more, two thirds of the rows are for the running ones.
        """
        ranked = sweep.ranked()
        there = {trial.number for trial in ranked}
        ordered = [*ranked, *(trial for number, trial in sorted(sweep.trials.items()) if number not in there)]
        over = [trial for trial in ranked if trial.over]
        running = [trial for trial in ordered if self._is_running(trial)]
        others = [trial for state in ("paused", "failed") for trial in ordered if trial.status == state]
        running = running[: max(room - len(over), room * 2 // 3)]
        over = over[: room - len(running)]
        return [*over, *running, *others][:room]

    def _head(self, sweep: Sweep) -> list[Text]:
        counts = self._counts(list(sweep.trials.values()), self._planned)
        over = sum(trial.over for trial in sweep.trials.values())
        of = f" of {self._planned}" if self._planned is not None else ""
        budget, best = self._tune.budget, sweep.best()
        hours = f" of {budget.gpu_hours:g}" if budget.gpu_hours else ""
        wall = f" of {clock(budget.wall_hours * 3600)}" if budget.wall_hours else ""
        parts = [
            Text(paths.base_name(sweep.root), style="bold"),
            Text(f"{over}{of} trials done{_listed(': ', counts)}"),
            Text(f"{hours_text(sweep.device_seconds / 3600)}{hours} device-hours"),
            Text(f"{clock(self._before + time.monotonic() - self._began)}{wall}"),
        ]
        if best is not None and best.value is not None:
            leads = "best" if best.status == "finished" else "ahead"  # of one that is on its way not much is known
            parts.insert(2, Text(f"{leads}: {best.name}, {sweep.metric} {number_text(best.value)}", style="bold"))
        return parts

    def _rest(self, sweep: Sweep, shown: Sequence[Trial]) -> str:
        there = {trial.number for trial in shown}
        counts = self._counts([trial for trial in sweep.trials.values() if trial.number not in there], None)
        counts.pop("waiting", None)  # the head lines have them
        return _listed("not shown: ", counts)

    def _counts(self, trials: Sequence[Trial], planned: int | None) -> dict[str, int]:
        running = sum(self._is_running(trial) for trial in trials)
        counts = Counter(trial.status for trial in trials)
        waiting = counts["waiting"] + counts["running"] - running + max((planned or 0) - len(trials), 0)
        known = {"running": running, "paused": counts["paused"], "waiting": waiting}
        return {**known, "finished": counts["finished"], "stopped": counts["stopped"], "failed": counts["failed"]}

    def _columns(
        self, shown: Sequence[Trial], rows: Mapping[int, Mapping[str, float]]
    ) -> tuple[list[Column], list[Column], list[Column]]:
        """What is always shown, the settings, and what is shown where there is room."""
        metric = self._sweep.metric
        newest = [rows.get(trial.number, {}) if self._is_running(trial) else {} for trial in shown]
        steps = [_steps(trial, row) for trial, row in zip(shown, newest, strict=True)]
        states = [self._progress(trial, *pair) for trial, pair in zip(shown, steps, strict=True)]
        first = [
            Column.of("trial", [trial.name for trial in shown]),
            Column("", states, STATE_CELLS),
            Column.of("step", [f"{step}/{total}" if total else "" for step, total in steps], right=True),
            Column.of(metric, [_number(trial.value) for trial in shown], right=True, least=NUMBER_CELLS),
        ]
        if metric != "loss":
            first.append(
                Column.of("loss", [_number(row.get("loss")) for row in newest], right=True, least=NUMBER_CELLS)
            )
        settings = [
            Column.of(name, [setting_text(trial.settings[key]) if key in trial.settings else "" for trial in shown])
            for key, name in self._names.items()
        ]
        extra = [Column.of("time", [clock(trial.seconds) for trial in shown], right=True)]
        if metric != "tokens_per_second":
            rates = [_number(row.get("tokens_per_second")) for row in newest]
            extra.insert(0, Column.of("tokens/s", rates, right=True))
        return first, settings, extra

    def _progress(self, trial: Trial, step: int, total: int) -> RenderableType:
        if not self._is_running(trial):
            return trial.status
        return ProgressBar(total, step, width=STATE_CELLS) if total else "starting"

    def _style(self, trial: Trial, best: Trial | None) -> str | None:
        if trial is best:
            return "bold"
        return {"stopped": "dim", "paused": "dim", "failed": "red"}.get(trial.status)


def _steps(trial: Trial, row: Mapping[str, float]) -> tuple[int, int]:
    """Step and total of a trial, as its newest row or report says; (0, 0) where there is neither."""
    if "step" in row and "total" in row:
        return int(row["step"]), int(row["total"])
    return (trial.step, trial.reports[-1].total) if trial.reports else (0, 0)


def _number(value: float | None) -> str:
    return "" if value is None else number_text(value)


def _listed(head: str, counts: Mapping[str, int]) -> str:
    there = [f"{number} {state}" for state, number in counts.items() if number]
    return head + ", ".join(there) if there else ""


def _first(error: str | None) -> str:
    return ((error or "").strip().splitlines() or ["it did not say why"])[0]


def _copy(trial: Trial) -> Trial:
    return replace(trial, settings=dict(trial.settings))
