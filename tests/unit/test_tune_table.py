"""What a person sees of a sweep: a line for each event that matters, and a table that fits the terminal."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from ray_ft.recipe import Tune
from ray_ft.tune.columns import number_text, setting_text, short_names
from ray_ft.tune.journal import Inherited, Report, Status, Sweep, Trial
from ray_ft.tune.table import ROWS, Event, Table
from ray_ft.view import View

LR, RANK = "train.optimizer.lr", "model.adapter.rank"
SHORT = {LR: {"loguniform": [1e-5, 1e-2]}, RANK: {"choice": [8, 16]}}
LONG: dict[str, Any] = {
    **SHORT,
    "model.path": {"choice": ["s3://a-bucket/with/a/long/name/gemma-3-27b", "模型/가나다"]},
    "model.adapter.target_modules": {"choice": [["*q_proj", "*v_proj", "*gate_proj"], "all-linear"]},
    "train.optimizer.name": {"choice": ["adamw", "adafactor"]},
    "model.adapter.name": {"choice": ["lora", "dora"]},
}


def sweep_of(**changes: Any) -> Sweep:
    return Sweep("/runs/words", "eval_loss", "min", "0" * 64, 0.0, **changes)


def tune_of(space: dict[str, Any] | None = None, **changes: Any) -> Tune:
    return Tune.model_validate({"space": space or SHORT, **changes})


def settings_of(number: int, space: dict[str, Any]) -> dict[str, Any]:
    return {key: d["choice"][number % 2] if "choice" in d else 10.0**-4 * (number + 1) for key, d in space.items()}


def plain(sweep: Sweep, planned: int | None = None) -> tuple[Table, io.StringIO]:
    out = io.StringIO()
    view = View(Console(file=out, highlight=False, soft_wrap=True))
    return Table(sweep, view, planned, tune_of()), out


class Told:
    """A sweep whose trials are told of step by step."""

    def __init__(self, table: Table, sweep: Sweep, space: dict[str, Any] = SHORT) -> None:
        self.table, self.sweep, self.space = table, sweep, space

    def start(self, number: int) -> Trial:
        trial = self.sweep.trials.setdefault(number, Trial(number, settings_of(number, self.space)))
        self.tell(number, "running", "started")
        return trial

    def report(self, number: int, step: int, value: float, total: int = 100) -> None:
        trial = self.sweep.trials[number]
        trial.seconds = step * 3.0
        trial.reported(Report(step, total, value, trial.seconds))
        self.table.changed(trial, "reported")

    def tell(self, number: int, status: Status, event: Event) -> None:
        self.sweep.trials[number].status = status
        self.table.changed(self.sweep.trials[number], event)


# -------------------------------------------------------------------------------------------------------------- lines


def test_a_line_for_each_event_that_matters() -> None:
    sweep = sweep_of()
    table, out = plain(sweep, planned=3)
    told = Told(table, sweep)
    with table.shown():
        for number in range(3):
            told.start(number)
        told.report(0, 25, 2.0)
        told.report(1, 25, 3.0)
        told.tell(1, "stopped", "stopped")
        sweep.trials[2].error = "train.optimizer.lr 9 is too large\n  → a smaller one"
        told.tell(2, "failed", "failed")
        table.alive(sweep.trials[0], {"step": 99, "total": 100, "loss": 1.5})
        told.report(0, 100, 0.5)
        told.tell(0, "finished", "finished")
        table.line("[bold]said[/bold]")
    assert out.getvalue().splitlines() == [
        "trial 0000 started: lr 0.0001, rank 8",
        "trial 0001 started: lr 0.0002, rank 16",
        "trial 0002 started: lr 0.0003, rank 8",
        "trial 0000 is the best so far; step 25 of 100, eval_loss 2.0000",
        "trial 0001 stopped by asha; step 25 of 100, eval_loss 3.0000; 0000 had 2.0000 there",
        "trial 0002 failed with lr 0.0003, rank 8: train.optimizer.lr 9 is too large",
        "trial 0000 finished; step 100 of 100, eval_loss 0.5000, the best so far (0:05:00)",
        "[bold]said[/bold]",
    ]


@pytest.mark.parametrize(
    ("mode", "values", "best"), [("min", [3.0, 4.0, 2.0], [0, 2]), ("max", [3.0, 4.0, 2.0], [0, 1])]
)
def test_the_mode_decides_what_is_best(mode: Any, values: list[float], best: list[int]) -> None:
    sweep = sweep_of()
    sweep.mode = mode
    table, out = plain(sweep)
    told = Told(table, sweep)
    for number, value in enumerate(values):
        told.start(number)
        told.report(number, 10, value)
    lines = [line for line in out.getvalue().splitlines() if "best" in line]
    assert [int(line.split()[1]) for line in lines] == best


def test_a_long_descent_of_one_trial_is_few_lines() -> None:
    sweep = sweep_of()
    table, out = plain(sweep)
    told = Told(table, sweep)
    told.start(0)
    for step in range(1, 101):
        told.report(0, step, 100.0 - step)
    lines = [line for line in out.getvalue().splitlines() if "best" in line]
    assert 9 <= len(lines) <= 11


def test_what_is_not_a_number_is_never_the_best() -> None:
    sweep = sweep_of()
    table, out = plain(sweep)
    told = Told(table, sweep)
    told.start(0)
    told.report(0, 10, float("nan"))
    assert "best" not in out.getvalue()
    told.report(0, 20, 2.0)
    assert "is the best so far; step 20" in out.getvalue()


def test_a_resumed_sweep_says_where_trials_go_on_and_knows_the_best() -> None:
    done = Trial(0, settings_of(0, SHORT), status="finished", reports=[Report(100, 100, 1.0, 300)])
    begun = Trial(1, settings_of(1, SHORT), status="running", reports=[Report(25, 100, 2.0, 75)])
    sweep = sweep_of(trials={0: done, 1: begun})
    table, out = plain(sweep)
    told = Told(table, sweep)
    told.start(1)
    told.report(1, 50, 1.5)
    told.tell(1, "paused", "paused")
    told.start(1)
    told.report(1, 75, 0.9)
    assert out.getvalue().splitlines() == [
        "trial 0001 goes on: lr 0.0002, rank 16; step 25 of 100, eval_loss 2.0000",
        "trial 0001 is the best so far; step 75 of 100, eval_loss 0.9000",
    ]


@pytest.mark.parametrize("told_first", ["started", "inherited"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_take_over_says_from_whom_and_what_changed(told_first: str, resumed: bool) -> None:
    """The settings are new when the trial starts again, or when it says that it took over: both are told alike."""
    sweep = sweep_of()
    if resumed:
        sweep.trials = {number: Trial(number, settings_of(number, SHORT)) for number in range(2)}
    table, out = plain(sweep)
    told = Told(table, sweep)
    trial = sweep.trials[1] if resumed else told.start(1)
    changed = {LR: 0.00012, RANK: 16}
    sweep.trials.setdefault(0, Trial(0, {}))
    if told_first == "started":
        trial.settings = changed
    told.tell(1, "running", "started")
    trial.settings = changed
    trial.inherited.append(Inherited(40, 0, changed))
    told.tell(1, "running", "inherited")
    assert out.getvalue().splitlines()[1:] == ["trial 0001 takes over from 0000 after step 40: lr 0.0002 → 0.00012"]


def test_the_trial_that_led_is_named_only_where_there_is_one() -> None:
    """Runs of other lengths are compared by their share; one that has not come as far is not."""
    sweep = sweep_of()
    table, out = plain(sweep)
    told = Told(table, sweep)
    for number in range(3):
        told.start(number)
    told.report(0, 5, 1.0)  # has not come as far
    told.report(1, 25, 2.0)
    told.tell(1, "stopped", "stopped")
    told.report(2, 50, 1.5, total=200)
    told.tell(2, "stopped", "stopped")
    told.report(0, 25, 3.0)
    told.tell(0, "stopped", "stopped")
    stopped = [line for line in out.getvalue().splitlines() if "stopped" in line]
    assert [line.partition("eval_loss ")[2] for line in stopped] == [
        "2.0000",
        "1.5000",
        "3.0000; 0002 had 1.5000 there",
    ]


# -------------------------------------------------------------------------------------------------------------- table


def terminal(width: int, height: int = 50) -> tuple[View, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=True,
        force_interactive=True,
        width=width,
        height=height,
        color_system=None,
        highlight=False,
        soft_wrap=True,
        legacy_windows=False,
    )
    return View(console), out


def busy(view: View, trials: int, space: dict[str, Any], running: int = 4, **changes: Any) -> Table:
    """A table of a sweep in which some finished, most were stopped, some failed and the last ones run."""
    sweep = sweep_of(seconds=600.0)
    table = Table(sweep, view, trials + 10, tune_of(space, **changes))
    told = Told(table, sweep, space)
    for number in range(trials):
        trial = told.start(number)
        told.report(number, 10, 5.0 + number / 100)
        if number >= trials - running:
            if number < trials - 1:
                table.alive(trial, {"step": 30, "total": 100, "loss": 7.25, "tokens_per_second": 12345.6})
            continue
        if number % 5 == 0:
            told.report(number, 100, 1.0 + number / 100)
            told.tell(number, "finished", "finished")
        elif number % 5 == 4:
            trial.error = "out of memory"
            trial.status = "failed"
            table._trials[number] = trial  # without its line
        else:
            told.tell(number, "stopped", "stopped")
    return table


def drawn(table: Table, view: View, out: io.StringIO) -> list[str]:
    out.truncate(0)
    out.seek(0)
    view.console.print(table._render())
    return out.getvalue().splitlines()


@pytest.mark.parametrize("space", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("trials", [4, 16, 64])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 50), (200, 50)])
def test_it_fits_the_terminal(width: int, height: int, trials: int, space: dict[str, Any]) -> None:
    view, out = terminal(width, height)
    lines = drawn(busy(view, trials, space), view, out)
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) < height
    titles = next(line for line in lines if line.startswith("trial"))
    assert {"step", "eval_loss", "loss", "lr"} <= set(titles.split())
    assert sum(line[:4].isdigit() for line in lines) == min(trials, ROWS, height - 9)


def test_best_first_then_running_and_the_others_are_counted() -> None:
    view, out = terminal(120, 24)
    lines = drawn(busy(view, 64, SHORT, running=12), view, out)
    assert lines[0].startswith(
        "words   52 of 74 trials done: 12 running, 10 waiting, 11 finished, 31 stopped, 10 failed"
    )
    assert lines[0].endswith("   best: 0000, eval_loss 1.0000")
    rows = [line for line in lines if line[:4].isdigit()]
    assert [row[:4] for row in rows[:5]] == ["0000", "0005", "0010", "0015", "0020"]
    assert [row[:4] for row in rows[5:]] == [f"00{number}" for number in range(52, 62)]
    assert all("30/100" in row and "7.2500" in row and "━" in row for row in rows[5:])
    assert lines[-1] == "not shown: 2 running, 6 finished, 31 stopped, 10 failed"


def test_what_does_not_fit_is_cut_then_counted() -> None:
    for width, shown in ((80, False), (200, True)):
        view, out = terminal(width)
        lines = drawn(busy(view, 4, LONG, running=2), view, out)
        text = "\n".join(lines)
        assert ("optimizer.name" in text and "adapter.name" in text and "dora" in text) == shown
        assert ("+" in next(line for line in lines if line.startswith("trial"))) == (not shown)
        assert ("tokens/s" in text) == shown


def test_a_trial_that_has_only_begun_and_one_that_waits_for_its_turn() -> None:
    left = Trial(0, settings_of(0, SHORT), status="running", reports=[Report(25, 100, 2.0, 75)])
    sweep = sweep_of(trials={0: left})
    view, out = terminal(120)
    table = Table(sweep, view, 3, tune_of())
    assert drawn(table, view, out)[0].startswith("words   0 of 3 trials done: 3 waiting   ahead: 0000")
    told = Told(table, sweep)
    told.start(1)
    lines = drawn(table, view, out)
    assert "1 running, 2 waiting" in lines[0]
    assert lines[-1].split() == ["0001", "starting", "0.0002", "16", "0:00:00"]
    told.start(0)
    assert any(line.startswith("0000   ━━") and "25/100" in line for line in drawn(table, view, out))
    told.tell(0, "paused", "paused")
    assert any(line.startswith("0000   paused") for line in drawn(table, view, out))


def test_the_row_of_before_a_take_over_is_not_shown_after_it() -> None:
    sweep = sweep_of()
    view, out = terminal(120)
    table = Table(sweep, view, 2, tune_of())
    told = Told(table, sweep)
    trial = told.start(0)
    table.alive(trial, {"step": 90, "total": 100, "loss": 7.25})
    assert "90/100" in drawn(table, view, out)[-1]
    told.tell(0, "paused", "paused")
    told.start(0)
    assert "90/100" not in "".join(drawn(table, view, out))


def test_budget_and_time_over_all_starts() -> None:
    view, out = terminal(200)
    table = busy(view, 2, SHORT, budget={"gpu_hours": 2, "wall_hours": 1.5})
    for trial in table._trials.values():
        trial.seconds, trial.workers = 900.0, 4
    assert "2.00 of 2 device-hours   0:10:0" in drawn(table, view, out)[0]
    assert " of 1:30:00" in drawn(table, view, out)[0]


def test_live_beside_lines_while_trials_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing and printing wait for each other only where neither waits for the other in turn."""
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    view, out = terminal(100, 30)
    sweep = sweep_of()
    table = Table(sweep, view, None, tune_of())
    told = Told(table, sweep)

    def work() -> None:
        with table.shown():
            for number in range(150):
                told.start(number)
                for step in (10, 20, 30):
                    told.report(number, step, 1.0)
                    table.alive(sweep.trials[number], {"step": step, "total": 100, "loss": 1.0})
                table.line(f"line {number}")
                view.console.print("", end="")  # draws
            sweep.trials[7].error = "why it failed"
            told.tell(7, "failed", "failed")

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(60)
    sys.setswitchinterval(before)
    assert not worker.is_alive()
    assert raised == []
    text = out.getvalue()
    assert "line 149" in text
    assert "trial 0007 failed with lr 0.0008, rank 16: why it failed" in text
    assert "1 failed" in text[text.rindex("trials done") :]  # the last state stays
    assert "trial 0000 started" not in text  # the table says so


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_printed_while_the_drawing_thread_has_to_wait(is_terminal: bool) -> None:
    sweep, (view, _) = sweep_of(), terminal(100)
    held: list[bool] = []

    class Listening(View):
        def line(self, text: str) -> None:
            held.append(table._lock.locked())

    view.console._force_terminal = view.console.is_interactive = is_terminal
    table = Table(sweep, Listening(view.console), None, tune_of())
    told = Told(table, sweep)
    told.start(0).error = "why"
    told.report(0, 10, 1.0)
    told.tell(0, "failed", "failed")
    assert held == ([False] if is_terminal else [False] * 3)


# -------------------------------------------------------------------------------------------------------------- words


def test_short_names_tell_keys_apart() -> None:
    keys = ["train.optimizer.lr", "train.optimizer.name", "model.adapter.name", "data.train.0.weight", "seed"]
    assert list(short_names(keys).values()) == ["lr", "optimizer.name", "adapter.name", "weight", "seed"]
    assert short_names(["a.b", "b", "c.a.b"]) == {"a.b": "a.b", "b": "b", "c.a.b": "c.a.b"}


def test_settings_and_metrics_on_one_line() -> None:
    values = [0.000123456, 16, "adamw", "two\nlines", ["*q", "*v"], None, True, "[red]"]
    shown = ["0.000123", "16", "adamw", '"two\\nlines"', '["*q", "*v"]', "null", "true", "[red]"]
    assert [setting_text(value) for value in values] == shown
    numbers = [0.0, 0.00001234, 1.23456, -5.5, 123.45, 12345.6, float("nan")]
    texts = ["0.0000", "1.23e-05", "1.2346", "-5.5000", "123.5", "12,346", "nan"]
    assert [number_text(value) for value in numbers] == texts
