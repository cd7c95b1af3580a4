"""What is run of a sweep, and what each trial reserves; how its records are read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweeps import recipe_with

from ray_ft import paths
from ray_ft.errors import ResourceError, StorageError
from ray_ft.placement import capacity
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.tune import run, trial
from ray_ft.tune.journal import Sweep, Trial
from ray_ft.tune.space import Space
from ray_ft.view import View

LR: dict[str, Any] = {"train.optimizer.lr": {"loguniform": [1e-5, 1e-2]}}

Make = Callable[..., Recipe]


@pytest.mark.parametrize(("search", "known"), [("random", 16), ("optuna", 12)])
def test_a_resumed_sweep_of_fewer_trials_runs_those_alone(
    search: str, known: int, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "steps", lambda recipe, view: 10)
    monkeypatch.setattr(capacity, "cluster", lambda say: [capacity.Nodes({"CPU": 4}, 1)])
    asked = []
    monkeypatch.setattr(run._Runner, "_fit", lambda self, settings, waiting, *_: asked.append(waiting))
    for wanted, expected in ((8, []), (11, [10]), (20, [*range(10, known)])):
        recipe = recipe_with(make_recipe, space=LR, trials=wanted, search=search)
        sweep = Sweep.create(recipe)
        for number in range(known):
            status: Any = "stopped" if number < 10 else "paused"
            sweep.save_trial(Trial(number, Space(recipe).draw(number), status=status))
        assert recipe.tune is not None
        run._Runner(recipe, recipe.tune, Space(recipe), sweep, View(Console(quiet=True))).run()
        if expected:
            assert [one.number for one in asked.pop()][: len(expected)] == expected
        assert not asked


def test_each_trial_counts_and_reserves_what_its_own_settings_say(make_recipe: Make) -> None:
    space = {"train.workers": {"choice": [0, 2]}, "train.cpus_per_worker": {"choice": [1, 3]}}
    in_process = {"train.workers": 0, "train.cpus_per_worker": 3}
    spread = {"train.workers": 2, "train.cpus_per_worker": 1, "train.global_batch": 4, "train.micro_batch": 1}
    base = recipe_with(make_recipe, space={**space, **{key: {"choice": [1, 4]} for key in list(spread)[2:]}})
    sweep = Sweep.create(base)
    record = run._Recorder(sweep, base)
    for number, settings in enumerate((in_process, spread)):
        record(number, settings)
    assert [one.workers for one in sweep.trials.values()] == [1, 2]

    def reserved(settings: dict[str, Any], cuda: bool) -> dict[str, float]:
        config = {"trial": {"number": 0, "settings": settings}}
        return dict(run._resources(base, cuda, config).required_resources)

    assert reserved(in_process, False) == {"CPU": 3}
    assert reserved(in_process, True) == {"CPU": 3, "GPU": 1}
    assert reserved(spread, True) == {"CPU": 0.001}  # its workers reserve the rest


def test_what_fits_no_cluster_leaves_nothing_in_the_way_of_a_recipe_that_does(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "steps", lambda recipe, view: 10)
    monkeypatch.setattr(capacity, "cluster", lambda say: [capacity.Nodes({"CPU": 4}, 1)])
    recipe = recipe_with(make_recipe, space=LR)
    large = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": "cuda"})})
    assert recipe.tune is not None
    with pytest.raises(ResourceError, match="GPU"):
        run._Runner(large, recipe.tune, Space(large), None, View(Console(quiet=True))).run()
    run._check_new(recipe)


def test_no_second_command_runs_a_sweep(make_recipe: Make) -> None:
    root = recipe_with(make_recipe, space=LR).run.dir.root
    with run._alone(root), pytest.raises(StorageError, match="another command runs the sweep"), run._alone(root):
        pytest.fail("it was let in")
    with run._alone(root):  # and after it another may
        pass
    assert not Path(root).exists()  # nothing was begun


@pytest.mark.parametrize(("scheduler", "share"), [("asha", 0.0625), ("median", 0.125)])
def test_no_report_lies_just_before_a_rung(scheduler: str, share: float, make_recipe: Make) -> None:
    base = recipe_with(make_recipe, space=LR, scheduler=scheduler)
    for total in (5, 16, 100, 1000, 12345):
        every = trial.due(base, base, total).train.eval_every
        assert every is not None
        assert every / total >= share
        assert (every - 1) / total < share


def test_a_sweep_that_was_killed_before_its_recipe_was_written_goes_on(make_recipe: Make) -> None:
    recipe = recipe_with(make_recipe, space=LR)
    sweep = Sweep.create(recipe)
    Path(recipe.run.dir.recipe).unlink()
    with pytest.raises(StorageError, match="there is a sweep at"):
        run._check_new(recipe)
    assert run._resumed(recipe).root == sweep.root
    assert Path(recipe.run.dir.recipe).exists()


@pytest.mark.parametrize(
    ("record", "content", "said"),
    [
        ("sweep.json", {"format": 2, "names": "others"}, "is in format 2, this version reads 1"),
        ("sweep.json", {"format": 1}, "cannot be read"),
        ("0000/trial.json", {"number": 0, "of": "another version"}, "cannot be read"),
    ],
)
def test_records_of_another_kind_are_refused(record: str, content: Any, said: str, make_recipe: Make) -> None:
    sweep = Sweep.create(recipe_with(make_recipe, space=LR))
    paths.write_json(paths.join(sweep.root, "0000/trial.json"), {"unreadable": "by this version"})
    paths.write_text(paths.join(sweep.root, record), json.dumps(content))
    with pytest.raises(StorageError, match=said):
        Sweep.load(sweep.root)


def test_a_record_that_cannot_be_written_is_an_error_with_ways_out(make_recipe: Make) -> None:
    sweep = Sweep.create(recipe_with(make_recipe, space=LR))
    Path(sweep.root, "0000").write_text("a file where a folder has to be")
    with pytest.raises(StorageError, match=r"0000/trial\.json cannot be written") as caught:
        sweep.save_trial(Trial(0, {}))
    assert any("--resume" in way for way in caught.value.ways_out)
