"""A job on the screen: on a terminal a bar and the newest figures below the lines, elsewhere the lines alone."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ray_ft.credentials import redacted
from ray_ft.submit.api import Job
from ray_ft.view import View

_STEP = re.compile(r"^step (\d+)/(\d+)\b\s*(.*)")
_COLOURS = {"SUCCEEDED": "green", "FAILED": "red", "RUNNING": "cyan"}


class Screen:
    """Shows one job; made by `shown`."""

    def __init__(self, view: View, live: Live | None) -> None:
        self._view, self._live = view, live
        self._bar = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=view.console
        )
        self._task: int | None = None

    def line(self, text: str) -> None:
        """A line of the job; of steps, a terminal shows only the newest."""
        found = _STEP.match(text)
        if self._live is None or found is None:
            self._view.line(text)
            return
        step, total, figures = int(found[1]), int(found[2]), found[3]
        if self._task is None:
            self._task = self._bar.add_task("step", total=total)
        self._bar.update(self._bar.task_ids[0], completed=step, total=total)
        self._live.update(Group(self._bar, Text(redacted(figures))))

    def say(self, text: str) -> None:
        """A line of our own."""
        self._view.console.print(f"[dim]{escape(text)}[/]")


@contextlib.contextmanager
def shown(view: View) -> Iterator[Screen]:
    if not view.console.is_terminal:
        yield Screen(view, None)
        return
    with Live(console=view.console, refresh_per_second=4) as live:
        yield Screen(view, live)


def table(jobs: Sequence[Job]) -> Table:
    """Of jobs, oldest first."""
    found = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("job", "verb", "run", "status", "began", "took"):
        found.add_column(name, overflow="fold")
    for job in jobs:
        began = "" if job.started is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        ended = "" if job.started is None else duration((job.ended or time.time()) - job.started)
        code = f" ({job.exit_code})" if job.status == "FAILED" and job.exit_code is not None else ""
        status = Text(job.status.lower() + code, style=_COLOURS.get(job.status, ""))
        found.add_row(job.id, job.verb, job.run, status, began, ended)
    return found


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    whole = max(int(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
