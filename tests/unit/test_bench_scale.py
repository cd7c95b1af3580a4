"""The scale benchmark's own arithmetic, and that what it times is what it says."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import page as pages
from benchmarks.result import Figure, Result, Table, read
from benchmarks.scale import __main__ as main
from benchmarks.scale import arms, checkpoints, data, extrapolate, growth, page, reports, sweeps, workers
from benchmarks.scale.extrapolate import Costs, Linear
from benchmarks.scale.files import write_rows
from benchmarks.scale.growth import Series
from benchmarks.scale.storage import counted
from ray_ft import paths
from ray_ft.data import checks, sources

# ------------------------------------------------------------------------------------------------------------- growth


def series(values: dict[int, list[float]], due: float = 1.0, floor: float = 1e-9) -> Series:
    return Series("listing", "files", "s", due, values, floor)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_exponent_is_the_power_of_the_last_two_sizes(power: float) -> None:
    one = series({1: [7.0], 10: [10**power], 1000: [1000**power]})
    assert one.exponents == pytest.approx([power])
    assert one.grows_too_fast is (power > 1.1)
    assert one.figure().reached is (power <= 1.1)
    assert series(dict(one.values), due=0.0).grows_too_fast is (power > 0.1)


def test_each_repetition_has_an_exponent_and_a_size_measured_once_lends_its_value() -> None:
    one = series({10: [1.0, 2.0, 4.0], 100: [10.0]})
    assert one.exponents == pytest.approx([1.0, 0.69897, 0.39794], abs=1e-4)
    assert one.per_unit == pytest.approx(8 / 90)


def test_what_cannot_be_told_from_nothing_does_not_grow() -> None:
    assert series({1: [-0.3], 2: [0.0004]}, floor=1e-3).exponents == [0.0]
    with pytest.raises(ValueError, match="two sizes"):
        _ = series({1: [1.0]}).exponents


def test_sizes_that_take_long_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    now = [0.0]
    monkeypatch.setattr(growth.time, "perf_counter", lambda: now[0])

    def run(size: int) -> dict[str, float]:
        now[0] += size
        return {"cost": float(next(clock))}

    found = growth.measured((1, 10, 100), run, 3)
    assert {size: len(values) for size, values in found["cost"].items()} == {1: 3, 10: 3, 100: 1}
    assert found["cost"][1][0] == 1.0  # the call before it was a warm-up


# --------------------------------------------------------------------------------------------------- what is measured


def test_the_same_rows_lie_in_any_number_of_files(tmp_path: Path) -> None:
    lines = []
    for files in (1, 7, 30):
        write_rows(tmp_path / "rows", files, 30)
        made = sorted((tmp_path / "rows").iterdir())
        assert len(made) == files
        lines.append("".join(file.read_text() for file in made))
    assert len(lines[0].splitlines()) == 30
    assert lines[0] == lines[1] == lines[2]


def test_requests_to_storage_are_counted_and_left_as_they_were(tmp_path: Path) -> None:
    real = paths.exists
    with counted() as found:
        paths.write_bytes(str(tmp_path / "a"), b"a")
        assert paths.exists(str(tmp_path / "a"))
        assert not paths.exists(str(tmp_path / "b"))
    assert dict(found) == {"write_bytes": 1, "exists": 2}
    assert paths.exists is real


def test_checkpoints_of_any_size_are_whole_and_only_their_number_grows(tmp_path: Path) -> None:
    shares = [checkpoints.spans_of(3, rank, 4) for rank in range(4)]
    assert sum(span.data.numel() for share in shares for span in share.values()) == 3 * (checkpoints.ELEMENTS // 3)
    found = {one.name: one for one in checkpoints.by_folder(str(tmp_path / "c"), 1, (2, 8))}
    requests = found["finding the newest, requests"]
    assert requests.values[2] == requests.values[8]
    assert requests.exponents == [0.0]
    by_shards = checkpoints.by_shards(str(tmp_path / "c"), 1, (1, 3))
    assert [one.of for one in by_shards] == ["workers"] * 3
    requests = by_shards[-1].values
    assert requests[3][0] - requests[1][0] == 2 * 2  # the part of each further worker is read and deleted


def test_an_index_without_rows_gives_an_order_over_all_of_them() -> None:
    size = 3 * data.UNIT + 5
    order = data.order_of(data.named_only(size))
    assert sum(part.take for part in order.slices(0, size)) == order.rows == size
    assert order.prepared.rows == sum(unit.rows for unit in order.prepared.units)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_sweep_without_training_ends_with_every_trial_over_and_one_finished(tmp_path: Path, search: str) -> None:
    loop = sweeps.Loop(sweeps.sweep_recipe(str(tmp_path), 8, search=search), str(tmp_path))
    made = loop.play()
    assert len(made.trials) == 8
    assert all(trial.over for trial in made.trials.values())
    best = made.best()
    assert best is not None
    assert best.status == "finished"
    assert loop.reports == sum(len(trial.reports) for trial in made.trials.values())
    assert loop.reports < 8 * sweeps.STEPS // sweeps.REPORT_EVERY  # ASHA ended most early


def test_a_report_of_many_steps_is_a_page_of_one_size(tmp_path: Path) -> None:
    found = {one.name: one for one in reports.by_steps(str(tmp_path), 1, (10, 3000))}
    size = found["logged steps, size of the page"]
    assert size.due == 0
    assert 0 < size.values[10][0] < size.values[3000][0] < 2 * size.values[10][0]


# ------------------------------------------------------------------------------------------------------------ workers


def run_of(step: float, wait: float, first: float, gib: float) -> dict[str, float]:
    rows = [{"step_seconds": 9.0, "data_wait_share": 1.0, "memory_gib": 0.1}] * workers.WARM_UP
    rows += [{"step_seconds": step, "data_wait_share": wait / step, "memory_gib": gib}] * 3
    return workers.of_run({"first": first, "rows": rows})


def test_overheads_are_what_is_left_when_one_way_is_taken_from_the_other() -> None:
    def runs(count: int) -> list[dict[str, dict[str, float]]]:
        return [
            {
                "plain": run_of(0.1, 0.001, 5.0, 0.5),
                "control": run_of(0.1 + 0.002 * count, 0.001, 9.0 + count, 0.6),
                "whole": run_of(0.15 + 0.002 * count, 0.001 + 0.01 * count, 12.0 + count, 0.75),
            }
        ]

    found = {one.name: one for one in workers.series_of({count: runs(count) for count in (4, 8)})}
    assert found["Ray's control, more of a step"].values == {4: pytest.approx([0.008]), 8: pytest.approx([0.016])}
    assert found["Ray Data, more of a step"].values[8] == pytest.approx([0.05])
    assert found["Ray Data, waiting for rows, of a step"].exponents == pytest.approx([1.0])
    assert found["Ray Train, more until the first step"].per_unit == pytest.approx(1.0)
    assert found["memory of a worker"].values[8] == pytest.approx([768.0])
    assert found["Ray, more memory of a worker"].exponents == pytest.approx([0.0])


def test_each_way_gets_the_same_rows(tmp_path: Path, demo: Any) -> None:
    write_rows(tmp_path / "files", 1, 200)
    job = arms.job(str(tmp_path), demo.base, str(tmp_path / "files"), 2, "run", steps=4)
    batches = [arms.in_memory(job, job.order, 0, rank, 2, 8) for rank in range(2)]
    assert [len(each) for each in batches] == [4, 4]
    first = [batch.first for pair in zip(*batches, strict=True) for batch in pair]
    assert first == list(range(0, 64, 8))


# ------------------------------------------------------------------------------------------------------ extrapolation


def test_a_line_is_fixed_and_each_and_noise_below_nothing_is_nothing() -> None:
    one = Linear.of(Series("x", "workers", "s", 1, {1: [3.0, 3.2], 2: [5.0, 5.2], 4: [9.0, 9.2]}))
    assert (one.fixed, one.each) == (pytest.approx(1.1), pytest.approx(2.0))
    assert one.beside() == pytest.approx(3.1)
    assert one.in_a_row(10) == pytest.approx(21.1)
    assert Linear.of(Series("x", "workers", "s", 1, {1: [2.0], 2: [1.0]})).each == 0.0


def costs(data_each: float = 0.001, control_each: float = 0.0001) -> Costs:
    return Costs(Linear(0.01, data_each), Linear(0.002, control_each), Linear(10.0, 0.5), 1e-6, 2e-6, Linear(5, 2))


def test_ray_data_is_hidden_by_the_step_and_control_is_not() -> None:
    found = extrapolate.extrapolate(costs(), 64, step=1.0, tensors=2000)
    assert found.best == pytest.approx(1.0 + 0.0021)
    assert found.worst == pytest.approx(1.0 + 0.002 + 64 * 0.0001)
    assert found.start == pytest.approx(42.0)
    assert found.requests == pytest.approx(133)
    assert (found.runs, found.commit, found.restore) == (128_000, pytest.approx(0.128), pytest.approx(0.256))


def test_ray_data_that_takes_longer_than_the_step_is_the_step() -> None:
    found = extrapolate.extrapolate(costs(data_each=0.004), 512, step=1.0, tensors=1)
    assert found.worst == pytest.approx(0.01 + 512 * 0.004 + 0.002 + 512 * 0.0001)
    assert found.best == pytest.approx(1.0021)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"step": 0.0}, {"tensors": 0}])
def test_nothing_is_extrapolated_from_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        extrapolate.extrapolate(costs(), **{"workers": 8, "step": 1.0, "tensors": 10, **wrong})


def test_the_table_has_a_row_for_each_fleet_and_rates_against_the_first() -> None:
    def plan(step: float) -> Any:
        speed = SimpleNamespace(step=step, compute=0.9, communication=0.5)
        recipe = SimpleNamespace(data=SimpleNamespace(seq_len=1024))
        parameters = [SimpleNamespace(trained=True)] * 4 + [SimpleNamespace(trained=False)]
        return SimpleNamespace(speed=speed, recipe=recipe, shapes=SimpleNamespace(parameters=parameters))

    free = Costs(Linear(0, 0), Linear(0, 0), Linear(1, 0), 0, 0, Linear(5, 2))
    table, measured = extrapolate.tables(free, {(8, "shards over all"): plan(1.0), (64, "shards over all"): plan(2.0)})
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells["of 8 GPUs' rate each"] == "50% to 50%"
    assert cells["tokens/s"] == "65,536 to 65,536"
    assert cells["runs in a checkpoint's index"] == f"{64 * 12:,}"
    assert len(measured.rows) == 5


def test_costs_are_found_among_the_series_that_are_measured() -> None:
    names = [one.name for one in workers.series_of({count: [] for count in (1, 2)})]
    more = ("committing", "restoring one worker's part", "requests of a commit")
    names += [f"checkpoint of many workers, {name}" for name in more]
    found = extrapolate.costs_of([Series(name, "workers", "s", 1, {1: [1.0], 2: [3.0]}) for name in names], 10)
    assert found.control == found.data == Linear(0.0, pytest.approx(2.0))
    assert found.start.each == pytest.approx(4.0)
    assert found.commit == pytest.approx(0.2)


def test_the_page_has_a_place_for_the_result_and_keeps_the_rest(tmp_path: Path) -> None:
    copy = tmp_path / "scale.md"
    copy.write_text(page.PAGE.read_text())
    about = {"cores": 2, "cpu": "a", "memory_gib": 1, "python": "3", "packages": {}}
    result = Result("scale", "what", {}, machine=about, began="2026-01-01", load=(0, 0))
    result.figures = [Figure("slow", [2.0], at_most=1.1), Figure("fine", [1.0], at_most=1.1)]
    result.tables = [Table("Gemma 3 27B, extrapolated", ("a",), [("b",)])]
    page.write(result, copy)
    made = copy.read_text()
    assert "Gemma 3 27B, extrapolated" in made
    assert "| slow |" in made
    assert "| fine |" not in made
    strip = lambda text: re.sub(r"<!-- scale -->.*<!-- /scale -->", "", text, flags=re.DOTALL)  # noqa: E731
    assert strip(made) == strip(page.PAGE.read_text())
    assert pages.made(made, {"scale": result}).count("<!-- scale -->") == 1


def test_the_files_of_the_benchmark_are_found_by_the_product(tmp_path: Path, demo: Any) -> None:
    write_rows(tmp_path / "rows", 3, 9, ".parquet")
    wanted = data.settings(tmp_path, demo.base, str(tmp_path / "rows")).data.train
    found = checks.all_files(wanted)
    checks.check_before(wanted, found, has_template=True)
    assert len([chunk for number, file in found for chunk in sources.chunks_of(file, number)]) == 3


def test_every_number_of_workers_is_measured_in_every_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    played: list[tuple[str, int]] = []

    def found(count: int, way: str) -> dict[str, Any]:
        played.append((way, count))
        seconds = {"plain": 0.1, "control": 0.2, "whole": 0.4}[way] * count
        row = {"step_seconds": seconds, "data_wait_share": 0.0, "memory_gib": 0.5}
        return {"first": seconds, "rows": [row] * (workers.WARM_UP + 1)}

    monkeypatch.setattr("ray_ft.session.connected", contextlib.nullcontext)
    monkeypatch.setattr(arms, "job", lambda scratch, base, rows, count, name: count)
    monkeypatch.setattr(arms, "plain", lambda job, scratch: found(job, "plain"))
    monkeypatch.setattr(arms, "with_ray", found)
    made = json.loads(json.dumps(workers._measure(tmp_path, "base", (1, 2), 2)))
    assert sorted(set(played)) == sorted((way, count) for way in arms.WAYS for count in (1, 2))
    series_ = {one.name: one for one in workers.series_of({int(count): runs for count, runs in made.items()})}
    assert series_["Ray Data, more of a step"].values == {1: pytest.approx([0.2] * 2), 2: pytest.approx([0.4] * 2)}
    assert series_["Ray's control, more of a step"].exponents == pytest.approx([1.0, 1.0])


def test_a_run_writes_its_result_and_makes_the_page_only_where_all_parts_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fast, slow = series({1: [1.0], 10: [10.0]}), series({1: [1.0], 10: [100.0]})
    parts = {"checkpoints": ("C", lambda *_: [fast]), "reports": ("R", lambda *_: [slow])}
    monkeypatch.setattr(main, "PARTS", parts)
    written: list[Result] = []
    monkeypatch.setattr(page, "write", written.append)
    for only in (["reports"], ["checkpoints", "reports"]):
        to = tmp_path / "scale.json"
        monkeypatch.setattr(sys, "argv", ["scale", "--only", *only, "--to", str(to)])
        main.main()
        result = read(to)
        assert [figure.reached for figure in result.figures][-1] is False
        assert [table.title for table in result.tables] == [parts[name][0] for name in only]
        assert len(written) == (len(only) == 2)
