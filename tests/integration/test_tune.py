"""Sweeps on a real Ray: trials are ordinary runs, wait and go on, take over from each other, and survive a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from ray_ft import artifacts, paths, session
from ray_ft import recipe as recipes
from ray_ft.demo import PROMPT, DemoPaths
from ray_ft.errors import RecipeError, ResourceError, StorageError
from ray_ft.recipe import Recipe
from ray_ft.train import checkpoint, launch
from ray_ft.train.metrics import read_metrics
from ray_ft.tune import run
from ray_ft.tune.journal import Sweep
from ray_ft.view import View
from tests.integration.servers import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 16
QUIET = View(Console(quiet=True))

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with session.ray_running("", session.OBJECT_STORE_BYTES):
        yield


@pytest.fixture(scope="module")
def make(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes sweeps over the demo, in one storage, so that the data is prepared once."""
    folder = tmp_path_factory.mktemp("runs")
    rows = {"format": "translation", "prompt": PROMPT}
    content = {
        "run": {"name": "sweep", "storage": str(folder)},
        "model": {"path": demo.base},
        "data": {
            "train": [{"path": list(demo.train), **rows}],
            "eval": [{"path": demo.heldout, **rows}],
            "seq_len": 128,
        },
        "train": {
            "strategy": "none",
            "workers": 0,
            "device": "cpu",
            "global_batch": 4,
            "micro_batch": 4,
            "max_steps": STEPS,
            "log_every": 1,
            "schedule": {"name": "constant"},
        },
        "tune": {"space": {"train.optimizer.lr": {"choice": [1e-6, 1e-5, 1e-2, 1e-4]}}, "asha": {"first": 0.25}},
    }
    (folder / "base.yaml").write_text(json.dumps(content))
    return lambda **changes: recipes.load(
        str(folder / "base.yaml"), [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    )


def made(recipe: Recipe, **options: Any) -> Sweep:
    run.tune(recipe, QUIET, **options)
    return Sweep.load(recipe.run.dir.root)


def held_groups() -> list[Any]:
    return [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]


def steps_of(sweep: Sweep, number: int) -> list[int]:
    return checkpoint.steps(artifacts.RunDir(paths.join(sweep.root, f"{number:04d}")).checkpoints)


@pytest.fixture(scope="module")
def halved(ray_cluster: None, make: Make) -> tuple[Recipe, Sweep]:
    """A grid of four settings, of which one cannot be trained."""
    recipe = make(
        **{
            "run.name": "halved",
            "tune.search": "grid",
            "tune.space": {
                "train.optimizer.lr": {"grid": [1e-6, 1e-5, 1e-2, 1e-4]},
                # 3 rows are no whole number of micro-batches: this trial fails alone.
                "train.global_batch": {"expr": "3 if train.optimizer.lr == 1e-4 else 4"},
            },
        }
    )
    before = len(held_groups())
    sweep = made(recipe)
    assert len(held_groups()) == before
    return recipe, sweep


def test_the_best_goes_to_the_end_and_the_others_stop_at_the_first_rung(halved: Any) -> None:
    _, sweep = halved
    assert {number: trial.status for number, trial in sweep.trials.items()} == {
        0: "stopped",
        1: "stopped",
        2: "finished",
        3: "failed",
    }
    assert [trial.step for trial in sweep.trials.values()] == [4, 4, STEPS, 0]
    best = sweep.best()
    assert best is not None
    assert best.settings["train.optimizer.lr"] == 1e-2
    rows = read_metrics(sweep.run_of(best))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # also where it waited and went on
    assert best.value == rows[-1]["eval_loss"]


def test_a_setting_that_fails_says_why_and_ends_nothing_else(halved: Any) -> None:
    _, sweep = halved
    assert "global_batch ÷ (micro_batch × workers) = 3 ÷ (4 × 1)" in sweep.trials[3].error
    assert "nearest valid global_batch: 4" in sweep.trials[3].error


def test_only_the_best_keeps_its_checkpoints(halved: Any) -> None:
    _, sweep = halved
    assert steps_of(sweep, 2)[-1] == STEPS
    assert [steps_of(sweep, number) for number in (0, 1, 3)] == [[], [], []]
    assert not paths.exists(paths.join(sweep.root, run.SCRATCH))


def test_each_trial_is_an_ordinary_run_and_the_best_recipe_runs_as_it_is(halved: Any) -> None:
    _, sweep = halved
    again = recipes.load(sweep.run_of(sweep.trials[2]).recipe)
    assert again.run.name == "halved/0002"
    assert launch.train(again, QUIET).taken == 0  # it is trained already
    table = pq.read_table(paths.join(sweep.root, "sweep.parquet")).to_pydict()
    assert sorted(set(table["number"])) == [0, 1, 2, 3]
    best = recipes.load(paths.join(sweep.root, "best.yaml"))
    assert best.train.optimizer.lr == 1e-2
    launch.train(best, QUIET)
    # The same rows and numbers: what waited on a rung, and went on, ended where an uninterrupted run ends.
    expected = {row["step"]: row["loss"] for row in read_metrics(best.run.dir)}
    assert expected == {row["step"]: row["loss"] for row in read_metrics(sweep.run_of(sweep.trials[2]))}


def test_a_sweep_of_this_name_is_not_begun_again(halved: Any, make: Make) -> None:
    recipe, sweep = halved
    with pytest.raises(StorageError, match="there is a sweep at") as caught:
        run.tune(recipe, QUIET)
    assert "--resume" in str(caught.value)
    with pytest.raises(StorageError, match="no sweep at"):
        run.tune(make(**{"run.name": "never"}), QUIET, resume=True)
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"clip_norm": 2.0})})
    with pytest.raises(RecipeError, match=r"train\.clip_norm was 1\.0, is 2\.0"):
        run.tune(changed, QUIET, resume=True)
    trials = {number: trial.seconds for number, trial in sweep.trials.items()}
    assert {number: trial.seconds for number, trial in made(recipe, resume=True).trials.items()} == trials


def test_an_exploited_trial_goes_on_from_its_parents_weights(ray_cluster: None, make: Make) -> None:
    recipe = make(
        **{
            "run.name": "population",
            "tune.space": {"train.optimizer.lr": {"loguniform": [1e-6, 1e-2]}},
            "tune.scheduler": "pbt",
            "tune.asha": {},
            "tune.pbt": {"every": 4},
            "tune.trials": 3,
            "tune.seed": 1,
            "tune.keep": 3,
            "tune.concurrency": 1,  # they take turns
        }
    )
    sweep = made(recipe)
    assert {trial.status for trial in sweep.trials.values()} == {"finished"}
    took = [(trial, one) for trial in sweep.trials.values() for one in trial.inherited]
    assert took
    for trial, one in took:
        if any(other.step > one.step for other in trial.inherited):
            continue  # its next step was taken again, from yet another one
        parent = {row["step"]: row["loss"] for row in read_metrics(sweep.run_of(sweep.trials[one.parent]))}
        child = {row["step"]: row["loss"] for row in read_metrics(sweep.run_of(trial))}
        later = [other.step for other in sweep.trials[one.parent].inherited]
        if not any(step > one.step for step in later):
            # Before its update, the loss of the next step is that of the parent's weights on the same rows: to the bit.
            assert child[one.step + 1] == parent[one.step + 1]
            assert child[one.step + 2] != parent[one.step + 2]
        assert one.settings == trial.settings
    assert len(steps_of(sweep, 0)) <= recipe.train.checkpoint.keep + 1


def test_trials_with_workers_give_everything_back(ray_cluster: None, make: Make) -> None:
    recipe = make(
        **{
            "run.name": "workers",
            "train.workers": 1,
            "train.strategy": "fsdp",
            "train.max_steps": 8,
            "tune.search": "grid",
            # The best begins first: where the others came to the rung before it, the better of them would go on, too.
            "tune.space": {"train.optimizer.lr": {"grid": [1e-2, 1e-6, 1e-5]}},
            "tune.concurrency": 2,
            "tune.asha": {"first": 0.5, "eta": 2},
        }
    )
    before = len(held_groups())
    sweep = made(recipe)
    assert [trial.status for trial in sweep.trials.values()] == ["finished", "stopped", "stopped"]
    assert len(held_groups()) == before
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < until:
        time.sleep(0.5)
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


def test_more_than_the_cluster_has_is_refused_before_anything_starts(ray_cluster: None, make: Make) -> None:
    recipe = make(**{"run.name": "large", "train.device": "cuda", "train.workers": 1, "train.strategy": "fsdp"})
    with pytest.raises(ResourceError, match="GPU"):
        run.tune(recipe, QUIET)


def test_the_death_of_one_trials_process_costs_that_trial_a_start_and_the_others_nothing(
    ray_cluster: None, make: Make
) -> None:
    recipe = make(
        **{"run.name": "deaths", "tune.scheduler": "none", "tune.asha": {}, "tune.trials": 2, "train.max_steps": 200}
    )
    killed: list[int] = []

    def kill() -> None:
        wait_for(recipe, lambda trials: len([one for one in trials.values() if running(one)]) == 2)
        for one in psutil.Process().children(recursive=True):
            if not killed and "ray::ResourceTrainable" in command_line(one):
                killed.append(one.pid)
                one.kill()

    killing = threading.Thread(target=kill)
    killing.start()
    out = io.StringIO()
    run.tune(recipe, View(Console(file=out, width=160)))
    killing.join()
    assert killed
    assert {trial.status for trial in Sweep.load(recipe.run.dir.root).trials.values()} == {"finished"}
    assert out.getvalue().count("starts again where it stands") == 1


@pytest.fixture
def command(tmp_path: Path, make: Make) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts `ray-ft tune` of a recipe in a session of its own; its output goes to a file."""

    def start(recipe: Recipe, *options: str) -> subprocess.Popen[bytes]:
        file = tmp_path / "sweep.yaml"
        file.write_text(recipe.to_yaml())
        with open(tmp_path / "out.txt", "ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "ray_ft", "tune", str(file), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": "local"},
                start_new_session=True,
            )

    return start


def test_a_sweep_that_is_killed_goes_on_and_repeats_nothing(
    make: Make, command: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, halved: Any
) -> None:
    lrs = [1e-6, 1e-5, 1e-2, 1e-4, 1e-3]
    recipe = make(
        **{
            "run.name": "killed",
            "tune.search": "grid",
            "tune.space": {"train.optimizer.lr": {"grid": lrs}},
            "tune.scheduler": "none",
            "tune.asha": {},
            "tune.concurrency": 2,
            "train.checkpoint.every": 4,
        }
    )
    process = command(recipe)
    try:
        over = wait_for(
            recipe, lambda trials: [t for t in trials.values() if t.over] and any(running(t) for t in trials.values())
        )
        tree = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=20)
    sweep = Sweep.load(recipe.run.dir.root)
    finished = {
        n: (t.seconds, Path(sweep.run_of(t).metrics).stat().st_mtime_ns) for n, t in sweep.trials.items() if t.over
    }
    begun = {n: steps_of(sweep, n)[-1] for n, t in sweep.trials.items() if running(t) and steps_of(sweep, n)}
    assert finished, over
    again = command(recipe, "--resume")
    assert again.wait(timeout=600) == 0, (tmp_path / "out.txt").read_text()
    sweep = Sweep.load(recipe.run.dir.root)
    assert {trial.status for trial in sweep.trials.values()} == {"finished"}
    for number, (seconds, touched) in finished.items():
        trial = sweep.trials[number]
        assert trial.seconds == seconds
        assert Path(sweep.run_of(trial).metrics).stat().st_mtime_ns == touched
    for number, step in begun.items():
        log = Path(sweep.run_of(sweep.trials[number]).at("logs", "trial.txt")).read_text()
        # It went on, and did not begin again; or was at its end, which the sweep had not heard of.
        assert (f"at step {step} of {STEPS}" if step < STEPS else f"already trained: {STEPS} of {STEPS}") in log
    best = sweep.best()
    assert best is not None
    assert best.settings == {"train.optimizer.lr": 1e-2}
    assert best.value == halved[1].best().value  # as in the sweep that nobody killed


def running(trial: Any) -> bool:
    return trial.status == "running" and bool(trial.reports)


def wait_for(recipe: Recipe, done: Callable[[dict[int, Any]], Any]) -> Any:
    until = time.monotonic() + 400
    while time.monotonic() < until:
        try:
            trials = Sweep.load(recipe.run.dir.root).trials
        except (StorageError, TypeError):
            trials = {}
        if trials and (found := done(trials)):
            return found
        time.sleep(0.3)
    raise AssertionError("it did not come to that")


def test_a_signal_saves_what_runs_and_a_budget_ends_a_sweep(
    make: Make, command: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    recipe = make(
        **{"run.name": "told", "tune.scheduler": "none", "tune.asha": {}, "tune.trials": 2, "train.max_steps": 400},
        **{"train.checkpoint.every": 10_000},  # so that none is saved but where it is told to stop
    )
    process = command(recipe)
    wait_for(recipe, lambda trials: any(running(trial) for trial in trials.values()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 128 + signal.SIGTERM, (tmp_path / "out.txt").read_text()
    sweep = Sweep.load(recipe.run.dir.root)
    saved = {n: steps_of(sweep, n) for n, t in sweep.trials.items() if running(t)}
    assert saved
    assert all(saved.values())
    assert "--resume" in (tmp_path / "out.txt").read_text()
    spent = recipe.model_copy(
        update={"tune": recipe.tune.model_copy(update={"budget": recipes.Budget(gpu_hours=1e-6)})}  # type: ignore[union-attr]
    )
    out = io.StringIO()
    outcome = run.tune(spent, View(Console(file=out, width=120)), resume=True)
    assert outcome.why == "tune.budget.gpu_hours = 1e-06 are spent"
    assert not any(trial.over for trial in outcome.sweep.trials.values())
