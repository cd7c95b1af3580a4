"""The table of tasks: which rows are replaced, and what makes the command fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks.tasks
from ray_ft import demo, recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tasks() -> Any:
    return benchmarks.tasks


@pytest.fixture
def run(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command over known scores; returns what it wrote."""
    monkeypatch.chdir(tmp_path)
    to = tmp_path / "tasks.md"
    to.write_text(f"above\n{tasks.BEGIN}\n{tasks.END}\nbelow\n")

    def command(name: str, trained: float | None, http: float | None, score: str = "exact_match") -> str:
        rows = [tasks.Row(score, 0.0, trained, 0.9, http, 1.25, "13 checks")]
        monkeypatch.setattr(tasks, "_rows", lambda *_: rows)
        monkeypatch.setattr(sys, "argv", ["tasks.py", name, "--to", str(to), "--folder", str(tmp_path / "kept")])
        tasks.main()
        return to.read_text()

    command.to = to  # type: ignore[attr-defined]
    return command


def test_rows_of_other_tasks_stay_and_the_order_is_that_of_the_tasks(run: Any) -> None:
    run("mixture", 0.95, 0.91)
    run("translation", 0.93, None, "reward_accuracy")
    text = run("mixture", 0.9, 0.9)
    assert text.startswith("above\n") and text.endswith("\nbelow\n")
    assert text.count("mixture") == 1
    assert text.index(
        "| translation | reward accuracy | 0.000 | 0.930 | 0.900 | none tells | 1.2 | 13 checks |"
    ) < text.index("| mixture | exact match | 0.000 | 0.900 | 0.900 | 0.900 | 1.2 | 13 checks |")


@pytest.mark.parametrize(("trained", "http"), [(0.89, 0.95), (0.95, 0.89), (None, 0.95), (0.95, None)])
def test_what_is_below_its_target_or_missing_fails_and_is_written(
    run: Any, trained: float | None, http: float | None
) -> None:
    with pytest.raises(SystemExit, match="below target: reasoning"):
        run("reasoning", trained, http)
    assert "| reasoning | exact match |" in run.to.read_text()


def test_a_step_that_fails_leaves_the_rest_out(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(name: str, *arguments: str) -> None:
        if arguments[0] == "train":
            raise tasks.StepFailed("train exited with 1")

    monkeypatch.setattr(tasks, "_verb", fail)
    (row,) = tasks._rows("reasoning", tasks.TASKS["reasoning"])
    assert (row.trained, row.http, row.minutes, row.exported) == (None, None, None, "no") and not row.reached


def test_every_task_has_its_recipe_and_its_demo(tasks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert {task.demo for task in tasks.TASKS.values()} == set(demo.TASKS)
    for name, task in tasks.TASKS.items():
        settings = recipe.load(str(ROOT / "configs" / f"{task.recipe}.yaml"))
        folder = "demo" if task.demo == "translation" else f"demo-{task.demo}"
        after = tasks.TASKS[task.after].recipe if task.after else None
        assert settings.model.path == (f"runs/{after}/export" if after else f"{folder}/base")
        sources = [*settings.data.train, *settings.data.eval]
        assert all(path.startswith(f"{tmp_path}/{folder}/") for source in sources for path in source.path)
        assert f"| {name}" in (ROOT / "docs" / "tasks.md").read_text()
