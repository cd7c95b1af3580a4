"""The page of a sweep: what stands on it, for whole sweeps and for those of which little is there."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweeps
from test_report import HOSTILE, Page

from ray_ft import paths
from ray_ft.errors import StorageError
from ray_ft.recipe import Recipe
from ray_ft.report import report, sweep_charts
from ray_ft.report.reading import Record
from ray_ft.report.sweep_reading import Swept
from ray_ft.report.swept import page as swept_page
from ray_ft.tune.journal import Report, Sweep, Trial
from ray_ft.view import View


@pytest.fixture
def swept(make_recipe: Callable[..., Recipe]) -> Recipe:
    return sweeps.recipe_with(make_recipe)


def made(sweep: Sweep) -> Page:
    location = report(sweep.root, View())
    assert location == f"{sweep.root}/report.html"
    return Page(Path(location).read_text(encoding="utf-8"))


def lines(figure: dict[str, Any]) -> dict[str, list[list[tuple[float, float]]]]:
    """Of each trace, the lines between its gaps."""
    told = {}
    for trace in figure["data"]:
        points = zip(trace["x"], trace["y"], strict=True)
        parts: list[list[tuple[float, float]]] = [[]]
        for x, y in points:
            if x is None:
                parts.append([])
            else:
                parts[-1].append((x, y))
        told[trace["name"]] = [part for part in parts if part]
    return told


def test_a_finished_sweep_is_shown_with_all_it_has(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    page, best = made(sweep), sweep.best()
    assert best is not None
    assert "complete: 16 trials" in page.text
    drawn = lines(page.figure("Learning curves"))
    assert drawn["best"] == [[(one.progress, one.value) for one in best.reports]]
    stopped = [trial for trial in sweep.trials.values() if trial.status == "stopped"]
    assert sorted(drawn["stopped"]) == sorted([(r.progress, r.value) for r in trial.reports] for trial in stopped)
    assert set(drawn) == {"best", "stopped"}  # the failed one never reported
    looks = {trace["name"]: trace["opacity"] for trace in page.figure("Learning curves")["data"]}
    assert looks["stopped"] < looks["best"] == 1
    spent = sum(trial.device_seconds for trial in sweep.trials.values())
    full = 200 * 15 + sweep.trials[3].device_seconds  # 100 s on two workers each, but for the one that failed
    assert f"of full runs of all {spent / full:.1%} which would be {full / 60:.3g} device-minutes" in page.text
    traces = page.figure("Budget spent per trial")["data"]
    bars = {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in traces}
    assert bars["best"] == {best.name: 200.0}
    assert bars["failed"] == {"0003": 5.0}
    for trial in stopped:
        assert bars["stopped"][trial.name] + bars["not run, as stopped"][trial.name] == pytest.approx(200)
    assert page.figure("Importance of the settings")["data"][0]["y"][-1] == "lr"
    assert "fANOVA" in page.text
    assert f"ray-ft train {sweep.root}/best.yaml" in page.text
    assert "Last traceback" not in page.text
    assert "Trial 0003 the loss is not finite at step 2 → train.optimizer.lr=…, a smaller one" in page.text
    assert "Who took over from whom" not in page.text
    assert "loguniform [1e-05, 0.01]" in page.text


def test_each_trial_goes_through_all_its_settings(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    figure = made(sweep).figure("Settings and metric")
    assert figure["layout"]["xaxis"]["ticktext"] == ["lr", "warmup_steps", "weight_decay", "loss"]
    drawn = [line for group in lines(figure).values() for line in group]
    assert len(drawn) == 15
    best = sweep.best()
    assert best is not None
    rates = [trial.settings["train.optimizer.lr"] for trial in sweep.trials.values() if trial.reports]
    low, high = min(rates), max(rates)
    place = math.log(best.settings["train.optimizer.lr"] / low) / math.log(high / low)  # as it is searched
    ((at_rate, at_warmup, _, at_loss),) = lines(figure)["best"]
    assert at_rate == pytest.approx((0, place))
    assert at_warmup == pytest.approx((1, best.settings["train.schedule.warmup_steps"] / 50))
    assert list(at_loss) == [3, 0]  # the least
    for line in drawn:
        assert [x for x, _ in line] == [0, 1, 2, 3]
        assert all(0 <= y <= 1 for _, y in line)
    beside = {(note["x"], note["text"]) for note in figure["layout"]["annotations"]}
    assert {(1, "0"), (1, "10"), (1, "50")} <= beside


def test_who_took_over_from_whom(swept: Recipe) -> None:
    page = made(sweeps.pbt(swept))
    assert "Its settings changed on the way (PBT)" in page.text
    one = r"\S+ \S+ → \S+"
    assert re.search(r"0001 48 0002 (lr|rate).*? → \S+ .*?0002 32 0001 ", page.text), one
    assert "The weights of the best trial: of 0001 up to step 32, then of 0002 to the end." in page.text
    assert "no end result belongs to one value" in page.text


def test_a_sweep_that_runs_and_one_that_was_killed(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    for number in (1, 2):
        sweep.trials[number].status = "running"
    sweeps.saved(sweep, 60.0)
    page = made(sweep)
    assert "running: 14 of 16 trials over" in page.text
    assert "of full runs" not in page.text  # two are still to run: that they are short says nothing
    hour_ago = time.time() - 3600
    for file in Path(sweep.root).rglob("*.json"):
        os.utime(file, (hour_ago, hour_ago))
    page = made(sweep)
    assert "stopped: 14 of 16 trials over" in page.text
    assert "ray-ft tune RECIPE --resume" in page.text
    # A trial that evaluates seldom still writes its metrics.
    run = sweep.run_of(sweep.trials[1])
    paths.write_text(run.recipe, paths.read_text(f"{sweep.root}/recipe.yaml"))
    paths.write_text(run.metrics, '{"step": 1, "loss": 1.0, "step_seconds": 0.5}\n')
    assert "running: 14 of 16 trials over" in made(sweep).text


def test_a_sweep_without_a_trial_or_report(swept: Recipe) -> None:
    sweep = Sweep.create(swept)
    page = made(sweep)
    assert "No trial has reported yet." in page.text
    assert "There is no trial yet." in page.text
    assert page.figures == []
    sweep.save_trial(Trial(0, {"train.optimizer.lr": 1e-3}, status="running"))
    page = made(sweep)
    assert "0000 running 0.001 — —" in page.text
    assert page.figures == []


def test_numbers_that_are_not_finite_leave_a_gap(swept: Recipe) -> None:
    sweep = Sweep.create(swept)
    values = [(4.0, math.nan, 3.0), (math.inf,), (2.0, 1.0, 0.5)]
    for number, told in enumerate(values):
        reports = [Report(at + 1, 3, value, 1.0) for at, value in enumerate(told)]
        sweep.trials[number] = Trial(number, {"train.epochs": number}, reports=reports, status="stopped", seconds=1.0)
    page = made(sweeps.saved(sweep, 1.0))
    assert sorted(line for group in lines(page.figure("Learning curves")).values() for line in group) == [
        [(1 / 3, 2.0), (2 / 3, 1.0), (1, 0.5)], [(1 / 3, 4.0), (1, 3.0)],
    ]  # fmt: skip
    assert "inf" in page.text


def test_many_trials_and_long_ones_stay_small(swept: Recipe) -> None:
    sweep = sweeps.asha(swept, 500, save=False)
    best = sweep.best()
    assert best is not None
    best.reports = [Report(step, 5000, 1.1 - step / 5000, float(step)) for step in range(1, 5001)]
    page = Page(swept_page(Swept(Record.read(sweep.root), sweep, None)))
    assert "The lines show the best 400 of 500 trials." in page.text
    (line,) = lines(page.figure("Learning curves"))["best"]
    assert len(line) <= sweep_charts.POINTS + 1
    assert line[-1] == pytest.approx((1, 0.1))
    assert page.text.count("stopped") > 400  # the table has all


def test_text_of_settings_and_errors_is_shown_and_never_run(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    for number, trial in sweep.trials.items():
        trial.settings["data.train.0.path"] = f"{HOSTILE}{number % 2}"
    sweep.trials[3].error = HOSTILE
    page = made(sweeps.saved(sweep, 1.0))
    assert page.text.count(HOSTILE) > 16
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [text for trace in page.figure("Learning curves")["data"] for text in trace["text"] if "<img" in text]
    assert not [note for note in page.figure("Settings and metric")["layout"]["annotations"] if "<" in note["text"]]
    assert [link for link in page.links if not link.startswith(("#", "data:,"))] == []


def test_credentials_of_uris_are_on_no_page(swept: Recipe) -> None:
    secret = "topsecret123"
    uri = f"s3://me:{secret}@bucket/data/*.jsonl?token=tok-12345"
    content = swept.model_dump(mode="json")
    content["data"]["train"][0]["path"] = [uri]
    sweep = sweeps.asha(Recipe.model_validate(content))
    sweep.trials[3].error = f"cannot read {uri}"
    for number, trial in sweep.trials.items():
        trial.settings["data.train.0.path"] = [uri, str(number % 3)]
    page = made(sweeps.saved(sweep, 1.0))
    assert secret not in page.html
    assert "tok-12345" not in page.html
    assert "cannot read s3://bucket/data/*.jsonl" in page.text


def test_a_journal_of_another_format_is_an_error(swept: Recipe) -> None:
    sweep = Sweep.create(swept)
    content = paths.read_json(f"{sweep.root}/sweep.json")
    paths.write_json(f"{sweep.root}/sweep.json", {**content, "format": 99})
    with pytest.raises(StorageError, match="format 99"):
        report(sweep.root, View())


def test_a_sweep_on_an_object_store_is_read_and_written_there(swept: Recipe) -> None:
    sweep = sweeps.asha(swept)
    there = "memory://bucket/runs/sweep"
    paths.upload_dir(sweep.root, there)
    try:
        assert report(there, View()) == f"{there}/report.html"
        assert "complete: 16 trials" in Page(paths.read_text(f"{there}/report.html")).text
        assert Swept.read(Record.read(there)).kind == "complete"
    finally:
        paths.delete_dir(there)
