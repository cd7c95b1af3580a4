"""A trial's training and what it has to say: it never waits for who does not hear it any more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeps import recipe_with

from ray_ft import artifacts
from ray_ft.errors import CheckpointError
from ray_ft.recipe import Recipe
from ray_ft.train import checkpoint
from ray_ft.train.asks import Ask
from ray_ft.tune import trial


@pytest.fixture
def training(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that trains in this process, without its thread."""
    monkeypatch.setattr(trial._Run, "_body", lambda self: None)
    base = recipe_with(make_recipe)
    base = base.model_copy(update={"train": base.train.model_copy(update={"workers": 0})})
    return trial._Run(trial.Context(base, {}, None), 0, {}, 0, 0.0)


def reporting(one: Any, step: int) -> threading.Thread:
    thread = threading.Thread(target=one.logged, args=({"step": step, "loss": 1.0}, 10), daemon=True)
    thread.start()
    return thread


def test_training_waits_until_its_report_was_judged(training: Any) -> None:
    thread = reporting(training, 1)
    assert training._reports.get(timeout=60)["loss"] == 1.0
    thread.join(0.2)
    assert thread.is_alive()
    training.go_on()
    thread.join(60)
    assert not thread.is_alive()


def test_training_that_was_told_to_end_waits_for_nobody(training: Any) -> None:
    ended = threading.Thread(target=training.end, args=(Ask.DROP,), daemon=True)
    ended.start()
    while training._asked is Ask.NOTHING or not training._heard.is_set():
        pass
    thread = reporting(training, 1)  # of the step under way
    thread.join(60)
    assert not thread.is_alive()
    training._over.set()
    ended.join(60)
    assert not ended.is_alive()
    with pytest.raises(queue.Empty):
        [training._reports.get(timeout=0.01) for _ in range(2)]


def test_a_checkpoint_is_waited_for_only_while_there_is_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    run = artifacts.RunDir(str(tmp_path))
    there: list[tuple[int, str]] = []
    monkeypatch.setattr(checkpoint, "committed", lambda folder: [(8, "old"), *there])
    with pytest.raises(CheckpointError, match="no checkpoint of step 16 or later"):
        trial.saved(run, 16, lambda: True)

    def over() -> bool:  # it is saved in the last moment
        there.append((16, "new"))
        return True

    assert trial.saved(run, 16, over) == (16, "new")
    assert trial.saved(run, 3, lambda: False) == (8, "old")
