"""What a person sees: few plain lines without a terminal, one panel on one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ray_ft.view import PLAIN_LINES, View


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1.25, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6, "memory_gib": 1.5}


def plain() -> tuple[View, io.StringIO]:
    out = io.StringIO()
    return View(Console(file=out, highlight=False, soft_wrap=True, width=80)), out


@pytest.mark.parametrize(
    ("total", "every", "start"), [(1000, 1, 0), (1000, 10, 0), (7, 1, 0), (1000, 1, 500), (3, 1, 2)]
)
def test_plain_lines_are_bounded_and_the_last_step_is_among_them(total: int, every: int, start: int) -> None:
    view, out = plain()
    with view.training(total, start) as panel:
        for step in range(start + 1, total + 1):
            if step == 1 or step % every == 0 or step == total:
                panel.update(row(step))
    lines = out.getvalue().splitlines()
    assert 1 <= len(lines) <= PLAIN_LINES + 2
    assert lines[0].startswith(f"step {start + 1}/{total}  loss 1.2500  lr 1.00e-03  grad norm 0.50  tokens/s 12,346")
    assert lines[-1].startswith(f"step {total}/{total} ")


def test_every_evaluation_is_shown() -> None:
    view, out = plain()
    with view.training(1000) as panel:
        for step in range(1, 301):
            panel.update({**row(step), **({"eval_loss": 0.75} if step in (7, 150) else {})})
    shown = [line for line in out.getvalue().splitlines() if "eval loss 0.7500" in line]
    assert [line.split()[1] for line in shown] == ["7/1000", "150/1000"]


def test_brackets_in_a_line_are_not_markup() -> None:
    view, out = plain()
    view.line("data.train[0]: [bold]not markup[/bold] [/nothing]")
    assert out.getvalue() == "data.train[0]: [bold]not markup[/bold] [/nothing]\n"


def test_progress_prints_nothing_without_a_terminal() -> None:
    view, out = plain()
    with view.progress("preparing") as progress:
        progress(1, 2)
    assert out.getvalue() == ""


def test_one_panel_on_a_terminal() -> None:
    out = io.StringIO()
    view = View(Console(file=out, force_terminal=True, width=200, color_system=None))
    with view.progress("preparing train data") as progress:
        progress(3, 4)
    with view.training(20, start=5) as panel:
        for step in range(6, 21):
            panel.update({**row(step), "mfu": 0.415, "data_wait_share": 0.02})
        panel.update({"step": 20, "eval_loss": 0.5})
    text = out.getvalue()
    assert "preparing train data" in text
    assert "20/20" in text
    for cell in ("loss", "1.2500", "eval loss", "0.5000", "12,346", "41.5%", "2.0%", "GiB/worker"):
        assert cell in text
    assert "step 6/20" not in text  # no plain lines beside it
