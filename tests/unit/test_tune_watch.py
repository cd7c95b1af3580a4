"""The journal's writer: what a trial takes over, and which checkpoints may go meanwhile."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sweeps import recipe_with

from ray_ft.recipe import Recipe
from ray_ft.tune import inherit, prune, run, watch
from ray_ft.tune.journal import Inherited, Report, Sweep, Trial
from ray_ft.tune.proposals import Slots
from ray_ft.tune.table import Table
from ray_ft.tune.trial import POINTER
from ray_ft.view import View

OLD, NEW = {"train.optimizer.lr": 1e-3}, {"train.optimizer.lr": 2e-3}
PBT = {"scheduler": "pbt", "space": {"train.optimizer.lr": {"loguniform": [1e-5, 1e-2]}}}


class Member:
    """A trial of Ray Tune, which stands at a checkpoint of a trial."""

    def __init__(self, folder: Path, number: int, standing: tuple[int, str] | None = None) -> None:
        self.config = {"trial": {"number": number, "settings": NEW}}
        self.status = "RUNNING"
        self.last_result: dict[str, Any] = {}
        self.run_metadata = SimpleNamespace(checkpoint_manager=SimpleNamespace(_latest_checkpoint_result=None))
        if standing:
            at = folder / f"pointer-{number}"
            at.mkdir(parents=True)
            (at / POINTER).write_text(json.dumps({"trial": standing[0], "step": 20, "checkpoint": standing[1]}))
            self.run_metadata.checkpoint_manager._latest_checkpoint_result = SimpleNamespace(
                path=str(at), as_directory=lambda: contextlib.nullcontext(str(at))
            )

    @property
    def checkpoint(self) -> Any:
        return self.run_metadata.checkpoint_manager._latest_checkpoint_result

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


@pytest.fixture
def sweep(make_recipe: Callable[..., Recipe]) -> tuple[Recipe, Sweep]:
    recipe = recipe_with(make_recipe, **PBT)
    made = Sweep.create(recipe)
    for number in range(3):
        reports = [Report(step, 100, 1.0, 1.0) for step in (10, 20, 30)]
        made.save_trial(Trial(number, dict(OLD), status="running", reports=reports))
    return recipe, made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is asked of pruning."""
    found: dict[str, Any] = {}
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr(prune, "losers", lambda sweep, keep, say, needed, busy: found.update(needed=set(needed)))
    monkeypatch.setattr(
        prune, "superseded", lambda sweep, keep, needed, say, busy: found.update(kept=set(needed), busy=set(busy))
    )
    return found


def watching(recipe: Recipe, sweep: Sweep) -> watch.Watch:
    assert recipe.tune is not None
    door = SimpleNamespace(inside=SimpleNamespace(remote=list), seconds=SimpleNamespace(remote=dict))
    table = Table(sweep, View(Console(quiet=True)), 3, recipe.tune)
    return watch.Watch(sweep, table, recipe.tune, 2, Slots(2), door)


def taken(step: int = 20) -> dict[str, Any]:
    return {"step": step, "parent": 0, "settings": NEW, "checkpoint": "parents"}


def test_who_takes_over_has_the_settings_from_then_on_and_the_reports_up_to_there(
    sweep: tuple[Recipe, Sweep], calls: Any, tmp_path: Path
) -> None:
    recipe, records = sweep
    one, child = watching(recipe, records), Member(tmp_path, 1, (0, "parents"))
    one.on_trial_start(0, [child], child)
    assert records.trials[1].settings == OLD  # nothing of it is on storage yet
    one.on_trial_result(0, [child], child, {"seconds": 1.0, "alive": {}, "inherited": taken()})
    read = Sweep.load(records.root).trials[1]
    assert read.settings == NEW
    assert read.inherited == [Inherited(20, 0, NEW)]
    assert [report.step for report in read.reports] == [10, 20]
    assert child.checkpoint is None  # should its process die, it does not take over again


def test_a_checkpoint_stays_until_all_that_go_on_from_it_have_it(
    sweep: tuple[Recipe, Sweep], calls: Any, tmp_path: Path
) -> None:
    recipe, records = sweep
    one = watching(recipe, records)
    parent, child, other = (Member(tmp_path, number, (0, "parents")) for number in range(3))
    for member in (parent, child, other):
        one.on_trial_start(0, [], member)
    parent.last_result = {"progress": 1.0}
    one.on_trial_complete(0, [parent, child, other], parent)
    parent.status = "TERMINATED"
    one.on_step_end(0, [parent, child, other])
    assert calls["needed"] == {"parents"}
    for member in (child, other):
        one.on_trial_result(0, [], member, {"seconds": 1.0, "inherited": taken()})
    one.on_trial_save(0, [parent, child, other], other)
    assert calls["kept"] == {"parents"}
    assert calls["busy"] == {1, 2}  # their own newest checkpoints say nothing while they copy
    report = {"seconds": 2.0, "step": 30, "total": 100, "loss": 0.5}
    one.on_trial_result(0, [], child, report)
    one.prune([parent, child, other])
    assert calls["needed"] == {"parents"}  # of the other one
    one.on_trial_result(0, [], other, report)
    one.prune([parent, child, other])
    assert calls["needed"] == set()


def test_what_a_killed_sweep_was_about_to_take_over_is_known_to_the_next(
    sweep: tuple[Recipe, Sweep], calls: Any, tmp_path: Path
) -> None:
    recipe, records = sweep
    inherit.intend(records.run_of(records.trials[1]), taken())
    resumed = run._resumed(recipe)
    assert resumed.trials[1].settings == NEW
    assert resumed.trials[1].inherited == [Inherited(20, 0, NEW)]
    assert [report.step for report in resumed.trials[1].reports] == [10, 20]
    assert run._resumed(recipe).trials[1].inherited == [Inherited(20, 0, NEW)]  # heard of again
    one = watching(recipe, resumed)
    one.prune()
    assert calls["needed"] == {"parents"}
