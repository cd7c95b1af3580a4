"""What a person sees: one live panel on a terminal, plain lines elsewhere. Never Ray's own noise, nor a secret."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ray_ft.credentials import Redacting, redacted

FILE_WIDTH = 120  # columns where there is no terminal to ask
PLAIN_LINES = 10  # lines of metrics that one training run prints where there is no terminal

_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "eval loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("eval_accuracy", "eval accuracy", "{:.3f}"),
    ("eval_macro_f1", "eval macro F1", "{:.3f}"),
    ("reward_accuracy", "reward accuracy", "{:.1%}"),
    ("reward_margin", "margin", "{:.3f}"),
    ("eval_reward_accuracy", "eval reward accuracy", "{:.1%}"),
    ("eval_reward_margin", "eval margin", "{:.3f}"),
    ("lr", "lr", "{:.2e}"),
    ("grad_norm", "grad norm", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("data_wait_share", "waiting for data", "{:.1%}"),
    ("memory_gib", "GiB/worker", "{:.2f}"),
)


class View:
    """Lines, one progress bar at a time, and the metrics of a training run."""

    def __init__(self, console: Console | None = None) -> None:
        # Looked up at each use, as tests and libraries replace it.
        out: Any = Redacting(lambda: sys.stdout)
        self.console = console or Console(file=out, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH

    def line(self, text: str) -> None:
        self.console.print(escape(redacted(text)))

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Any]:
        """A bar on a terminal, nothing elsewhere. Yields a callback that takes (done, total)."""
        if not self.console.is_terminal:
            yield lambda done, total: None
            return
        with _bar(self.console) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def training(self, total: int, start: int = 0, *, plain: bool = False) -> Iterator[TrainingPanel]:
        """The metrics of a run; `plain`: lines, also on a terminal."""
        panel = TrainingPanel(self.console, total, start, live=self.console.is_terminal and not plain)
        with panel.shown():
            yield panel


class TrainingPanel:
    """The state of one training run, from rows of metrics."""

    def __init__(self, console: Console, total: int, start: int, live: bool) -> None:
        self._console, self._total, self._shows_live = console, total, live
        self._latest: dict[str, float] = {}
        self._bar = _bar(console)
        self._task = self._bar.add_task("step", total=total, completed=start)
        self._live: Live | None = None
        self._next_line = self._evaluations = 0
        self._began = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        if not self._shows_live:
            yield
            return
        with Live(self._render(), console=self._console, refresh_per_second=4) as self._live:
            yield

    def update(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics. Without a terminal, a run prints about `PLAIN_LINES` of them, and every evaluation."""
        step = int(row["step"])
        self._latest.update(row)
        self._bar.update(self._task, completed=step)
        if self._live is not None:
            self._live.update(self._render())
        elif step >= self._next_line or step == self._total or self._shows_evaluation(row):
            shown = "  ".join(f"{title} {form.format(row[key])}" for key, title, form in _COLUMNS if key in row)
            self._console.print(f"step {step}/{self._total}  {shown}")
            self._next_line = step - step % -(-self._total // PLAIN_LINES) + -(-self._total // PLAIN_LINES)

    def _shows_evaluation(self, row: Mapping[str, float]) -> bool:
        self._evaluations += "eval_loss" in row
        return "eval_loss" in row and self._evaluations <= PLAIN_LINES

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3))
        cells = [(title, form.format(self._latest[key])) for key, title, form in _COLUMNS if key in self._latest]
        table.add_row(*(f"[dim]{title}[/dim]" for title, _ in cells))
        table.add_row(*(f"[bold]{value}[/bold]" for _, value in cells))
        return Group(self._bar, table)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
