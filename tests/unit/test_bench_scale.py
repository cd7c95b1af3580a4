"""The scale benchmark's own arithmetic, and that what it times is what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import page as pages
from benchmarks.result import Figure, Result, Table, read
from benchmarks.scale import __main__ as main
from benchmarks.scale import arms, checkpoints, data, extrapolate, growth, page, reports, sweeps, workers
from benchmarks.scale.extrapolate import Costs
from benchmarks.scale.files import write_rows
from benchmarks.scale.fit import Linear
from benchmarks.scale.growth import Series
from benchmarks.scale.storage import counted
from ray_ft import paths, recipe
from ray_ft.data import checks, sources, stream
from ray_ft.plan.shapes import Parameter
from ray_ft.train import checkpoint

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


@pytest.mark.parametrize(
    "values",
    [
        {4: [-3.5], 8: [9.25]},  # once taken for a growth of log2(9.25 / floor)
        {4: [2.0], 8: [-1.0]},  # once taken for none
        {4: [0.5, 2.0, -0.1], 8: [4.0]},
        {4: [0.9], 8: [4.0]},
    ],
)
def test_what_cannot_be_told_from_nothing_has_no_verdict(values: dict[int, list[float]]) -> None:
    one = series(values, floor=1.0)
    assert one.measurable is False
    assert (one.exponents, one.figure(), one.grows_too_fast) == ([], None, None)
    assert "not measurable" in one.row()[-1]


def test_a_cost_above_the_floor_at_the_last_two_sizes_has_one() -> None:
    assert series({1: [-1.0], 4: [2.0], 8: [4.0]}, floor=1.0).exponents == [1.0]
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
    in_bytes = {one.name: one for one in checkpoints.by_bytes(str(tmp_path / "c"), 1, (1, 2))}
    assert in_bytes["checkpoint of many bytes, committing"].due == 0
    assert in_bytes["checkpoint of many bytes, writing"].of == "MiB"
    assert sum(span.data.nbytes for span in checkpoints.spans_of(100, elements=2 << 18).values()) / 2**20 == (
        pytest.approx(2, rel=0.01)
    )
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


def run_of(step: float, wait: float, first: float, gib: float, talk: float = 0.0) -> dict[str, list[float]]:
    rows = [{"step_seconds": 9.0, "data_wait_share": 1.0, "memory_gib": 0.1}] * workers.WARM_UP
    row = {"step_seconds": step, "data_wait_share": wait / step, "memory_gib": gib, arms.TALK: talk}
    return workers.of_run({"first": first, "rows": rows + [row] * 6})


def test_overheads_are_what_is_left_when_one_way_is_taken_from_the_other() -> None:
    def runs(count: int) -> list[dict[str, dict[str, float]]]:
        return [
            {
                "plain": run_of(0.1, 0.001, 5.0, 0.5),
                "control": run_of(0.1 + 0.002 * count, 0.001, 9.0 + count, 0.6, 1e-5 * count),
                "whole": run_of(0.15 + 0.002 * count, 0.001 + 0.01 * count, 12.0 + count, 0.75),
            }
        ]

    found = {one.name: one for one in workers.series_of({count: runs(count) for count in (4, 8)})}
    assert found["Ray's control, more of a step"].values == {
        4: pytest.approx([0.008] * workers.BLOCKS),
        8: pytest.approx([0.016] * workers.BLOCKS),
    }
    assert found["Ray Data, more of a step"].values[8] == pytest.approx([0.05] * workers.BLOCKS)
    assert found["Ray Data, waiting for rows, of a step"].values[4] == pytest.approx([0.041] * workers.BLOCKS)
    assert found["Ray's control, talking to the board, of a step"].values[8] == pytest.approx([8e-5] * workers.BLOCKS)
    assert found["Ray Train, more until the first step"].per_unit == pytest.approx(1.0)
    assert found["memory of a worker"].values[8] == pytest.approx([768.0])
    assert found["Ray, more memory of a worker"].exponents == pytest.approx([0.0])


def test_a_block_of_slow_steps_is_a_value_of_its_own() -> None:
    row = {"data_wait_share": 0.5, "memory_gib": 0.1}
    rows = [{**row, "step_seconds": 9.0}] * workers.WARM_UP
    rows += [{**row, "step_seconds": seconds} for seconds in (1.0, 1.0, 2.0, 2.0)]
    found = workers.of_run({"first": 3.0, "rows": rows})
    assert (found["step"], found["wait"], found["first"]) == ([1.0, 2.0], [0.5, 1.0], [3.0])


def test_control_builds_no_dataset_and_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ft.train import cluster, controller

    seen: list[Any] = []

    def run(job: Any, watcher: Any) -> None:
        def start() -> Any:
            return "found", stream.training_dataset(job, 0, 1)

        dealer = controller.Dealer(start, 8, None)  # type: ignore[arg-type]
        dealer.before_worker_group_start(SimpleNamespace(num_workers=2))
        seen.append(dealer.before_init_train_context([])["dataset_shard_provider"])
        dealer.after_worker_group_shutdown(None)

    monkeypatch.setattr(cluster, "run", run)
    monkeypatch.setattr(stream, "training_dataset", lambda *_: "dataset")
    monkeypatch.setattr(stream, "deal", lambda rows, workers, share, options: ["rows"] * workers)
    for way in ("control", "whole"):
        if way == "whole":
            monkeypatch.setattr(controller.Dealer, "after_worker_group_shutdown", lambda *_: None)
        arms.with_ray(None, way)  # type: ignore[arg-type]
    assert [[(part.found, part.rows) for part in parts] for parts in seen] == [
        [("found", None)] * 2,
        [("found", "rows")] * 2,
    ]


def test_the_link_says_in_each_row_how_long_a_step_talked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(arms.time, "perf_counter", lambda: now[0])
    pushed: list[dict[str, float]] = []

    def push(self: Any, kind: str, content: Any) -> None:
        pushed.append(content)
        now[0] += 0.5

    def leaving() -> bool:
        now[0] += 0.25
        return False

    monkeypatch.setattr(arms.BoardLink, "_push", push)
    link = arms.Timed(None, 0, leaving)
    for _ in range(2):
        link.asked(), link.asked()
        now[0] += 7
        link.log({"loss": 1.0})
    assert pushed == [{"loss": 1.0, arms.TALK: 0.25}, {"loss": 1.0, arms.TALK: 0.5}]


def test_each_way_gets_the_same_rows(tmp_path: Path, demo: Any) -> None:
    write_rows(tmp_path / "files", 1, 200)
    job = arms.job(str(tmp_path), demo.base, str(tmp_path / "files"), 2, "run", steps=4)
    batches = [arms.in_memory(job, job.order, 0, rank, 2, 4) for rank in range(2)]
    assert [len(each) for each in batches] == [4, 4]
    first = [batch.first for pair in zip(*batches, strict=True) for batch in pair]
    assert first == list(range(0, 32, 4))


# ------------------------------------------------------------------------------------------------------ extrapolation


def test_a_line_is_fixed_and_each() -> None:
    one = Linear.of({1: [3.0, 3.2], 2: [5.0, 5.2], 4: [9.0, 9.2]})
    assert (one.fixed, one.each) == (pytest.approx(1.1), pytest.approx(2.0))
    assert one.beside() == pytest.approx(3.1)
    assert one.in_a_row(10) == pytest.approx(21.1)
    # Six values off by 0.1 each: a variance of 6 · 0.01 ÷ 4, and by the textbook ÷ Σ(n − n̄)² for the slope.
    assert one.variances[1] == pytest.approx(0.015 / (2 * (16 / 9 + 1 / 9 + 25 / 9)))
    assert one.error(10) ** 2 == pytest.approx(one.variances[1] * (10 - 7 / 3) ** 2 + 0.015 / 6)
    assert one.said()[1].startswith("2e+03 ±")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({1: [12.0], 2: [91.0], 4: [-36.0], 8: [-51.0]}, (4.0, 0.0)),  # not the free line's 58.5, its slope cut off
        ({1: [0.0], 2: [1.0], 4: [3.0]}, (0.0, 14 / 21)),
        ({1: [-1.0], 2: [-2.0], 4: [-3.0]}, (0.0, 0.0)),
    ],
)
def test_where_one_part_would_be_negative_the_other_is_fitted_anew(
    values: dict[int, list[float]], expected: tuple[float, float]
) -> None:
    one = Linear.of(values)
    assert (one.fixed, one.each) == pytest.approx(expected)
    assert one.each == 0 or one.most(8) >= one.in_a_row(8)


def test_noise_is_not_told_from_nothing() -> None:
    one = Linear.of({1: [0.012], 2: [0.091], 4: [-0.036], 8: [-0.051]})
    assert all(said.startswith("not told from 0, ≤") for said in one.said())
    assert one.most(512) > 5  # what so little of a measurement leaves open at 512 workers
    with pytest.raises(ValueError, match="2 sizes and 3 values"):
        Linear.of({1: [1.0], 2: [2.0]})


LAYOUT = "shards over all"


def costs(rows_each: float = 0.001, board_each: float = 0.0001) -> Costs:
    index = {LAYOUT: {8: [0.1], 64: [0.3, 0.1, 0.2], 512: [4.0]}}
    free = Linear(0, 0)
    return Costs(
        Linear(0.01, rows_each), Linear(0.002, board_each), Linear(10.0, 0.5), free, free, index, index, Linear(5, 2)
    )


def test_overheads_come_on_top_of_the_step_beside_each_other_and_in_a_row() -> None:
    found = extrapolate.extrapolate(costs(), 64, 1.0, LAYOUT)
    assert found.best == pytest.approx(1.0 + 0.011 + 0.0021)
    assert found.worst == pytest.approx(1.0 + 0.01 + 0.064 + 0.002 + 0.0064)
    assert found.start == found.start_most == pytest.approx(42.0)
    assert found.requests == pytest.approx(133)
    assert (found.commit, found.restore) == (0.2, 0.2)


def test_what_is_not_known_of_an_overhead_is_in_the_worst_case() -> None:
    unknown = dataclasses.replace(costs(), board=Linear(0.0, 0.0, (0.0, 1e-6, 0.0)))
    found = extrapolate.extrapolate(unknown, 512, 1.0, LAYOUT)
    assert found.worst == pytest.approx(1.01 + 0.512 + 2 * 512 * 1e-3)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"step": 0.0}])
def test_nothing_is_extrapolated_from_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        extrapolate.extrapolate(costs(), **{"workers": 8, "step": 1.0, "layout": LAYOUT, **wrong})


def plan(step: float = 1.0, gpus: int = 8, *, optimizer: str = "adafactor", replicas: int = 1) -> Any:
    """A matrix of 100 rows, one of 10, a vector of 20, and a frozen one."""
    content = {
        "run": {"name": "x"},
        "model": {"path": "x"},
        "data": {"train": [{"path": ["x"], "format": "text"}], "seq_len": 1024},
        "train": {
            "workers": gpus, "global_batch": 2 * gpus, "optimizer": {"name": optimizer}, "fsdp": {"replicas": replicas},
            "strategy": "fsdp",
        },
    }  # fmt: skip
    shapes = [((100, 7), True), ((10, 7), True), ((20,), True), ((50, 7), False)]
    parameters = [Parameter(str(shape), shape, trained, 4, 0) for shape, trained in shapes]
    speed = SimpleNamespace(step=step, compute=0.9, communication=0.5)
    fleet = SimpleNamespace(nodes=1)
    return SimpleNamespace(
        speed=speed, recipe=recipe.parse(content), shapes=SimpleNamespace(parameters=parameters), fleet=fleet
    )


def test_runs_of_an_index_are_those_that_workers_write() -> None:
    whole = 3 + 2 + 2 + 1  # of each weight its count of steps; two factors of a matrix, a moment of a vector
    assert extrapolate.runs_of(plan()) == 8 + 5 + 7 + whole  # 10 rows are on 5 workers in twos, 20 on 7 in threes
    assert extrapolate.runs_of(plan(gpus=16, replicas=2)) == extrapolate.runs_of(plan())  # one copy alone writes
    assert extrapolate.runs_of(plan(optimizer="adamw")) == 3 * (8 + 5 + 7) + 3
    assert extrapolate.indexes({(16, "a"): plan(gpus=16, replicas=2)}) == {"a": {16: (8, 20 + whole)}}


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_runs_of_an_index_are_those_of_the_product(optimizer: str) -> None:
    """FSDP2's own cut over 8 workers, whose collectives do nothing (torch's fake process group)."""
    import torch.distributed as dist
    from torch import nn
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ray_ft.strategy import Layout
    from ray_ft.strategy.fsdp import FSDP
    from ray_ft.train import optim, shards

    one = plan(optimizer=optimizer)
    names: list[str] = []
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            with torch.device("meta"):
                module = nn.Module()
                shapes = [tuple(p.shape) for p in one.shapes.parameters if p.trained]
                for at, shape in enumerate(shapes):
                    module.register_parameter(f"p{at}", nn.Parameter(torch.empty(shape)))
            strategy = FSDP(Layout(rank, 8, torch.device("cpu"), torch.float32), one.recipe.train.fsdp)
            strategy.setup(module, [], lambda _: None, partial(optim.build, one.recipe.train.optimizer, seed=0))
            spans = dict(strategy.spans())
            for name, moments in strategy.moments().items():
                spans |= {f"{name}/{moment}": span for moment, span in moments.items()}
            names += shards.owned(spans)
        finally:
            dist.destroy_process_group()
    assert len(names) == extrapolate.runs_of(one)


def test_the_table_has_a_row_for_each_fleet_and_rates_against_the_first() -> None:
    free = dataclasses.replace(costs(), rows=Linear(0, 0), board=Linear(0, 0))
    table, measured = extrapolate.tables(free, {(8, LAYOUT): plan(1.0), (64, LAYOUT): plan(2.0, 64)})
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells["of 8 GPUs' rate each"] == "50% to 50%"
    assert cells["tokens/s"] == "65,536 to 65,536"
    assert cells["runs in a checkpoint's index"] == f"{50 + 10 + 20 + 8:,}"
    assert len(measured.rows) == 5


def test_costs_are_found_among_the_series_that_are_measured() -> None:
    counts = (1, 2, 4)
    found = [
        Series(one.name, "workers", "s", 1, {count: [1.0 + 2 * count] for count in counts})
        for one in workers.series_of({count: [] for count in counts})
    ]
    requests = Series(
        "checkpoint of many workers, requests of a commit", "workers", "", 1, {1: [6.0], 2: [8.0], 3: [10.0]}
    )
    found.append(requests)
    for layout in extrapolate.LAYOUTS:
        found += [
            Series(checkpoints.index_name(layout, name), "workers", "s", 1, {8: [seconds]})
            for name, seconds in zip(checkpoints.INDEX, (1.0, 2.0), strict=True)
        ]
    made = extrapolate.costs_of(found)
    assert (made.rows.fixed, made.rows.each) == (made.board.fixed, made.board.each) == pytest.approx((1.0, 2.0))
    assert made.start.each == pytest.approx(4.0)
    assert (made.commit[LAYOUT][8], made.restore[LAYOUT][8]) == ([1.0], [2.0])


def test_an_index_as_large_as_asked_for_is_committed(tmp_path: Path) -> None:
    indexes = {LAYOUT: {2: (2, 7), 3: (3, 9)}, "copies": {4: (2, 7)}}
    found = {one.name: one for one in checkpoints.by_runs(str(tmp_path / "c"), 1, indexes)}
    assert len(found) == 4
    assert sorted(found[checkpoints.index_name(LAYOUT, "committing")].values) == [2, 3]
    (location,) = [str(one) for one in (tmp_path / "c").iterdir() if one.name.startswith("step")]
    index = checkpoint.index(location)  # of the copies: 4 tensors, each of 2 workers
    assert [len(stored.runs) for stored in index.values()] == [2] * 4


def test_the_page_has_a_place_for_the_result_and_keeps_the_rest(tmp_path: Path) -> None:
    copy = tmp_path / "scale.md"
    copy.write_text(page.PAGE.read_text())
    about = {"cores": 2, "cpu": "a", "memory_gib": 1, "python": "3", "packages": {}}
    result = Result("scale", "what", {}, machine=about, began="2026-01-01", load=(0, 0))
    result.figures = [Figure("slow", [2.0], at_most=1.1), Figure("fine", [1.0], at_most=1.1)]
    result.tables = [Table("Gemma 3 27B, extrapolated", ("a",), [("b",)])]
    page.write(result, copy)
    made = copy.read_text()
    assert "The machine was not quiet" not in made
    page.write(dataclasses.replace(result, load=(1.1, 0)), copy)  # on two cores
    assert "The machine was not quiet" in copy.read_text()
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
        return {"first": seconds, "rows": [row] * (workers.WARM_UP + workers.BLOCKS)}

    monkeypatch.setattr("ray_ft.session.connected", contextlib.nullcontext)
    monkeypatch.setattr(arms, "job", lambda scratch, base, rows, count, name: count)
    monkeypatch.setattr(arms, "plain", lambda job, scratch: found(job, "plain"))
    monkeypatch.setattr(arms, "with_ray", found)
    made = json.loads(json.dumps(workers._measure(tmp_path, "base", (1, 2), 2)))
    for way, count in ((way, count) for way in arms.WAYS for count in (1, 2)):
        assert played.count((way, count)) == 2 + (count == 1)  # one more of the smallest, as a warm-up
    series_ = {one.name: one for one in workers.series_of({int(count): runs for count, runs in made.items()})}
    assert series_["Ray Data, more of a step"].values == {1: pytest.approx([0.2] * 4), 2: pytest.approx([0.4] * 4)}
    assert series_["Ray's control, more of a step"].exponents == pytest.approx([1.0] * 4)


def test_a_run_writes_its_result_and_makes_the_page_only_where_all_parts_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fast, slow = series({1: [1.0], 10: [10.0]}), series({1: [1.0], 10: [100.0]})
    noise = series({1: [1.0], 10: [-1.0]})
    parts = {"checkpoints": ("C", lambda *_: [fast]), "reports": ("R", lambda *_: [slow, noise])}
    monkeypatch.setattr(extrapolate, "plans", dict)
    monkeypatch.setattr(main, "PARTS", parts)
    written: list[Result] = []
    monkeypatch.setattr(page, "write", written.append)
    for only in (["reports"], ["checkpoints", "reports"]):
        to = tmp_path / "scale.json"
        monkeypatch.setattr(sys, "argv", ["scale", "--only", *only, "--to", str(to)])
        main.main()
        result = read(to)
        assert [figure.reached for figure in result.figures][-1] is False
        untold = "Not measurable, so without a verdict"
        assert [table.title for table in result.tables] == [*(parts[name][0] for name in only), untold]
        assert "(--many) were left out" in result.conditions["sizes"]
        assert len(written) == (len(only) == 2)
