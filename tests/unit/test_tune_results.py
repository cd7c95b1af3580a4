"""What a sweep leaves: its table, its best recipe, the importance of settings, the run that its folder stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sweeps

from ray_ft import artifacts, export, paths
from ray_ft import recipe as recipes
from ray_ft.answers import Target, found
from ray_ft.errors import CheckpointError, StorageError
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.trained import Trained
from ray_ft.tune import results
from ray_ft.tune.importance import LEAST, Importance, importance
from ray_ft.tune.journal import Inherited, Report, Sweep, Trial
from ray_ft.view import View
from serving import models


@pytest.fixture
def swept(make_recipe: Callable[..., Recipe]) -> Recipe:
    return sweeps.recipe_with(make_recipe)


def table(sweep: Sweep) -> list[dict[str, Any]]:
    location = results.write_table(sweep)
    assert location == paths.join(sweep.root, "sweep.parquet")
    return pq.read_table(location).to_pylist()


# ------------------------------------------------------------------------------------------------------------- table


def test_the_table_has_a_row_for_each_report(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    rows = table(sweep)
    reports = [(trial, report) for trial in sweep.trials.values() for report in trial.reports]
    assert len(rows) == len(reports) + 1  # trial 3 never reported
    best = sweep.best()
    assert best is not None
    for trial, report in reports:
        (row,) = [row for row in rows if row["number"] == trial.number and row["step"] == report.step]
        assert row == {
            "number": trial.number, "status": trial.status, "error": None, "step": report.step, "total": 64,
            "progress": report.step / 64, "loss": report.value, "seconds": report.seconds,
            "device_seconds": report.seconds * 2, "trial_device_seconds": trial.seconds * 2, **trial.settings,
            "best": trial is best,
        }  # fmt: skip
    (failed,) = [row for row in rows if row["number"] == 3]
    assert (failed["step"], failed["loss"], failed["progress"]) == (None, None, None)
    assert failed["error"].startswith("the loss is not finite")
    assert failed["train.optimizer.lr"] == sweep.trials[3].settings["train.optimizer.lr"]
    assert {type(row["train.schedule.warmup_steps"]) for row in rows} == {int}


def test_settings_of_several_types_are_json_and_absent_ones_null(swept: Recipe) -> None:
    sweep = Sweep.create(swept)
    values = [{"name": "lora", "rank": 8}, None, "é"]
    for number, value in enumerate(values):
        sweep.trials[number] = Trial(
            number, {"model.adapter": value, "model.freeze": number > 0, "train.epochs": number}
        )
    sweep.trials[3] = Trial(3, {"train.epochs": 1.5})
    rows = table(sweep)
    assert [row["model.adapter"] for row in rows] == ['{"name": "lora", "rank": 8}', None, '"é"', None]
    assert [row["model.freeze"] for row in rows] == [False, True, True, None]
    assert [row["train.epochs"] for row in rows] == [0.0, 1.0, 2.0, 1.5]
    assert all(row["step"] is None and row["seconds"] == 0 and row["best"] is False for row in rows)


def test_rows_have_the_settings_with_which_they_were_trained(swept: Recipe) -> None:
    """Under PBT these change: a row behind the change has the new ones, none has later ones."""
    trial = Trial(0, {"train.optimizer.lr": 3e-3}, first={"train.optimizer.lr": 1e-3}, inherited=[
        Inherited(8, 1, {"train.optimizer.lr": 2e-3}), Inherited(16, 1, {"train.optimizer.lr": 3e-3}),
    ])  # fmt: skip
    for step in (4, 8, 12, 16, 20):
        trial.reported(Report(step, 20, 1.0, 1.0))
    sweep = Sweep.create(swept)
    sweep.trials[0] = trial
    assert [row["train.optimizer.lr"] for row in table(sweep)] == [1e-3, 1e-3, 2e-3, 2e-3, 3e-3]


# -------------------------------------------------------------------------------------------------------------- best


def test_the_best_recipe_trains_as_it_is(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    best = sweep.best()
    assert best is not None
    location = results.write_best(sweep, swept)
    assert location == paths.join(sweep.root, "best.yaml")
    text = paths.read_text(location)
    assert text.startswith(
        f"# ray-ft train {location}\n# Trial {best.name} of the sweep 'sweep', the best of 16: loss "
    )
    assert f"{best.value:.6g} at step 64 of 64, finished." in text
    assert "\ntune:" not in text
    loaded = recipes.load(location)
    assert loaded.run.name == "sweep-best"
    assert loaded.tune is None
    assert loaded.train.optimizer.lr == best.settings["train.optimizer.lr"]
    assert loaded.train.schedule.warmup_steps == best.settings["train.schedule.warmup_steps"]
    rest = {"run", "tune", "train"}
    assert loaded.model_dump(exclude=rest) == swept.model_dump(exclude=rest)
    outcome = launch.train(recipes.load(location, ["train.max_steps=1"]), View())
    assert outcome.complete


def test_the_best_recipe_says_what_may_mislead(swept: Recipe) -> None:
    assert results.write_best(Sweep.create(swept), swept) is None
    assert not paths.exists(paths.join(swept.run.dir.root, "best.yaml"))
    sweep = sweeps.pbt(swept)
    location = results.write_best(sweep, swept)
    assert location is not None
    assert "changed on the way (PBT), the last time after step 32:" in paths.read_text(location)
    for trial in sweep.trials.values():
        trial.status = "running"
    assert "No trial has gone to the end yet" in paths.read_text(str(results.write_best(sweep, swept)))


# -------------------------------------------------------------------------------------------------------- importance


def test_the_setting_that_decides_has_the_largest_share(swept: Recipe) -> None:
    content = swept.model_dump(mode="json")
    for count in (16, 40):
        told = importance(sweeps.asha(swept, count), content)
        assert isinstance(told, Importance)
        assert next(iter(told.shares)) == "train.optimizer.lr"
        assert told.shares["train.optimizer.lr"] > 0.6
        assert sum(told.shares.values()) == pytest.approx(1)
        assert (told.trials, told.progress) == (count - 1, 4 / 64)  # where all were compared; one has failed


def test_other_settings_decide_in_other_sweeps(swept: Recipe) -> None:
    """Not the name and not the range: what the metric follows has the share."""
    sweep = sweeps.asha(swept, 40)
    for trial in sweep.trials.values():
        decay = trial.settings["train.optimizer.weight_decay"]
        trial.reports = [Report(one.step, one.total, 1 + decay, one.seconds) for one in trial.reports]
    told = importance(sweep, swept.model_dump(mode="json"))
    assert isinstance(told, Importance)
    assert next(iter(told.shares)) == "train.optimizer.weight_decay"


def test_what_few_trials_did_later_counts_for_none(swept: Recipe) -> None:
    content = swept.model_dump(mode="json")
    sweep = sweeps.asha(swept)
    told = importance(sweep, content)
    for trial in sweep.trials.values():
        trial.reports = [
            one if one.step <= 4 else Report(one.step, one.total, 99.0 + trial.number, one.seconds)
            for one in trial.reports
        ]
    assert importance(sweep, content) == told


def test_a_condition_that_is_false_leaves_the_recipes_own_value(swept: Recipe) -> None:
    sweep = sweeps.asha(swept, 30)
    for number, trial in sweep.trials.items():
        if number % 2:
            trial.settings.pop("train.optimizer.weight_decay")
        trial.settings["train.clip_norm"] = 2 * trial.settings["train.optimizer.lr"]
        trial.settings["run.seed"] = f"{number}"
        trial.settings["train.epochs"] = 1
    content = swept.model_dump(mode="json")
    content["tune"]["space"]["train.clip_norm"] = {"expr": "2 * train.optimizer.lr"}
    told = importance(sweep, content)
    assert isinstance(told, Importance)
    assert set(told.shares) == set(sweeps.SPACE)
    for trial in sweep.trials.values():
        trial.settings.setdefault("train.optimizer.weight_decay", swept.train.optimizer.weight_decay)
    assert importance(sweep, content) == told
    assert told.left_out == {
        "train.clip_norm": "it follows from the others",
        "run.seed": "it is no number, and differs in every trial",
        "train.epochs": "it has one value",
    }


def test_too_little_gives_a_reason(swept: Recipe) -> None:
    content = swept.model_dump(mode="json")
    assert importance(Sweep.create(swept), content) == (
        f"0 trials have reported: from {LEAST} on it is reckoned what each setting contributes."
    )
    few = sweeps.asha(swept, LEAST)
    assert isinstance(importance(few, content), str)  # one of them has failed
    for trial in few.trials.values():
        trial.reports = [Report(4, 64, 1.0, 1.0)]
    assert "no difference" in str(importance(few, content))
    few.trials[0].reports = [Report(4, 64, math.nan, 1.0)]
    assert f"{LEAST - 1} trials have reported" in str(importance(few, content))
    assert "changed on the way" in str(importance(sweeps.pbt(swept), content))


# ---------------------------------------------------------------------------------------------- the run of a sweep


def test_a_sweep_stands_for_its_best_trial(tmp_path: Path) -> None:
    root = str(tmp_path / "sweep")
    assert artifacts.run_of(root) == root
    assert artifacts.run_of("nowhere/run") == "nowhere/run"
    paths.write_json(f"{root}/sweep.json", {"best": 7})
    assert artifacts.run_of(root) == f"{root}/0007"
    assert artifacts.run_of(root + "/") == f"{root}/0007"
    assert artifacts.run_of(f"file://{root}") == f"file://{root}/0007"
    assert artifacts.run_of(f"{root}/0003") == f"{root}/0003"
    paths.write_json(f"{root}/sweep.json", {"best": None})
    with pytest.raises(CheckpointError, match="has no best trial yet") as caught:
        artifacts.run_of(root)
    assert any("--resume" in way for way in caught.value.ways_out)
    for damaged in ("{", "[]", '{"best": "x"}'):
        paths.write_text(f"{root}/sweep.json", damaged)
        with pytest.raises(StorageError, match="cannot be read"):
            artifacts.run_of(root)


@pytest.fixture
def trained(swept: Recipe, make_recipe: Callable[..., Recipe]) -> tuple[str, str]:
    """A sweep whose second trial is the best and was trained, and the run directory of that trial."""
    sweep = Sweep.create(swept)
    for number, value in enumerate((2.0, 1.0)):
        sweep.trials[number] = Trial(number, {}, reports=[Report(2, 2, value, 1.0)], status="finished")
    sweeps.saved(sweep, 2.0)
    content = make_recipe("train.max_steps=2").model_dump(mode="json")
    content["run"]["name"] = "sweep/0001"
    recipe = recipes.parse(content)
    launch.train(recipe, View())
    return sweep.root, recipe.run.dir.root


def test_verbs_take_a_sweep_for_its_best_trial(trained: tuple[str, str]) -> None:
    """Evaluate, generate and chat look it up as a target; export as what was trained; serve as an export."""
    sweep, trial = trained
    assert Target.of(sweep) == Target("run", trial)
    assert found.find(Target.of(sweep)).name == "sweep/0001 (checkpoint of step 2)"
    assert Trained.of(sweep).run.root == trial
    manifest = export.export(sweep, View(), vllm=False)
    assert manifest.folder == f"{trial}/export"
    assert manifest.run == "sweep/0001"
    (model,) = models.load([sweep])
    assert [each.name for each in model.served] == ["sweep-0001"]  # no slash: it would read like a hub id
    (named,) = models.load([sweep], model_name="mine")
    assert named.name == "mine"
    content = json.loads(paths.read_text(f"{sweep}/sweep.json"))
    paths.write_json(f"{sweep}/sweep.json", {**content, "best": None})
    for use in (Target.of, Trained.of, lambda location: models.load([location])):
        with pytest.raises(CheckpointError, match="has no best trial yet"):
            use(sweep)
