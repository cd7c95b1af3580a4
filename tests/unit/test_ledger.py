"""The sample ledger: names travel with the rows, and what it says was used is what was used."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ft import artifacts, paths
from ray_ft.data import ledger, sources, stream
from ray_ft.data import work as works
from ray_ft.data.ledger import Ledger
from ray_ft.data.order import Order
from ray_ft.data.prepare import prepare
from ray_ft.data.render import load_tokenizer
from ray_ft.data.stream import Batch, local_batches
from ray_ft.demo import DemoPaths
from ray_ft.errors import TrainingError
from ray_ft.recipe import Recipe

GLOBAL = 8


@pytest.fixture
def order(make_recipe: Callable[..., Recipe], demo: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Two epochs of the demo in many units, shuffled, with a ledger."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 12_000)
    monkeypatch.setattr(works, "SEGMENT_TOKENS", 1500)
    recipe = make_recipe("data.ledger=true", "data.shuffle_window=4000", "train.epochs=2")
    order = Order.of(recipe, prepare(recipe, "train", demo.base, stream.in_process))
    assert order.ledger and len(order.prepared.units) > 8
    return order


def steps_of(order: Order) -> int:
    return -(-order.rows // GLOBAL)


def recorded(order: Order, world: int, first: int, last: int) -> bytes:
    """What `world` workers record of steps (first, last], put together."""
    parts = []
    for rank in range(world):
        worker = Ledger()
        batches = local_batches(order, first * GLOBAL, last * GLOBAL, rank, world, GLOBAL // world)
        for step, batch in enumerate(batches, start=first + 1):
            worker.add(step, batch)
        parts.append(worker.take())
        assert worker.take() == b""
    return ledger.merge(parts[::-1])  # in whatever order they come


def write(run: artifacts.RunDir, step: int, content: bytes) -> None:
    paths.write_bytes(run.at("ledger", f"step_{step:08d}.jsonl"), content)


def test_two_workers_and_one_record_the_same(order: Order) -> None:
    steps = steps_of(order)
    one, two, four = (recorded(order, world, 0, steps) for world in (1, 2, 4))
    assert one == two == four
    lines = [json.loads(line) for line in one.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["first"] for line in lines] == list(range(0, steps * GLOBAL, GLOBAL))
    assert all(len(line["samples"]) == GLOBAL for line in lines)


def test_each_sample_is_used_once_per_epoch_by_a_run_in_parts(order: Order, tmp_path: Path, demo: DemoPaths) -> None:
    run, steps = artifacts.RunDir(str(tmp_path)), steps_of(order)
    third = steps // 3
    write(run, third, recorded(order, 2, 0, third))
    write(run, 2 * third, recorded(order, 4, third, 2 * third))
    write(run, steps, recorded(order, 1, 2 * third, steps))
    found = ledger.read(run)
    assert list(found) == list(range(1, steps + 1))
    epochs = ledger.consumed(found, order)
    assert len(epochs) == 2
    names = {
        name for unit in order.prepared.units for row in range(unit.rows) for name in order.prepared.names(unit, row)
    }
    assert len(names) == 600 and {name.rpartition(":")[0] for name in names} == set(demo.train)
    for epoch in epochs:
        assert epoch == Counter(dict.fromkeys(names, 1))


def test_a_step_lost_or_taken_twice_shows(order: Order) -> None:
    found = {e["step"]: e["samples"] for e in map(json.loads, recorded(order, 1, 0, steps_of(order)).splitlines())}
    lost = ledger.consumed({step: rows for step, rows in found.items() if step != 2}, order)
    assert len(lost[0]) < 600
    twice = ledger.consumed({**found, 3: found[2]}, order)
    assert max(twice[0].values()) == 2 and len(twice[0]) < 600


def test_the_names_are_those_of_what_stands_in_the_row(order: Order, demo: DemoPaths) -> None:
    tokenizer = load_tokenizer(demo.base)
    lines = {path: Path(path).read_text().splitlines() for path in demo.train if path.endswith("jsonl")}
    checked = 0
    for batch in local_batches(order, 0, 80, 1, 2, 4):
        assert batch.samples is not None and len(batch.samples) == 4
        for at, names in enumerate(batch.samples):
            decoded = tokenizer.decode(batch.rows.input_ids[at].tolist())
            assert list(names) == order.locate(batch.first + at)
            for name in names:
                path, _, number = name.rpartition(":")
                if path in lines:
                    row = json.loads(lines[path][int(number) - 1])
                    assert row["source_text"] in decoded and row["target_text"] in decoded
                    checked += 1
    assert checked > 40


def test_padding_names_no_sample(order: Order) -> None:
    stop = (steps_of(order) + 1) * GLOBAL
    *_, last = local_batches(order, 0, stop, 0, 1, GLOBAL)
    assert last.samples == (("padding",),) * GLOBAL
    counted = ledger.consumed({stop // GLOBAL: [list(row) for row in last.samples]}, order)
    assert sum(map(len, counted)) == 0


def test_without_a_ledger_batches_name_nothing_and_cannot_be_recorded(order: Order) -> None:
    quiet = replace(order, ledger=False)
    batch = next(local_batches(quiet, 0, 8, 0, 1, 8))
    assert batch.samples is None
    with pytest.raises(TrainingError, match="step 1: the batch does not name its samples"):
        Ledger().add(1, batch)


def test_workers_that_leave_a_gap_or_overlap_are_an_error(order: Order) -> None:
    batches = [next(local_batches(order, 0, 8, rank, 2, 4)) for rank in (0, 1)]
    for other, position in ((batches[0], 0), (Batch(5, batches[1].rows, batches[1].samples), 5)):
        parts = []
        for batch in (batches[0], other):
            worker = Ledger()
            worker.add(1, batch)
            parts.append(worker.take())
        with pytest.raises(TrainingError, match=f"ledger of step 1: a worker used rows from position {position} on"):
            ledger.merge(parts)


def test_work_done_again_has_to_say_the_same(order: Order, tmp_path: Path) -> None:
    run = artifacts.RunDir(str(tmp_path))
    assert ledger.read(run) == {}
    write(run, 4, recorded(order, 2, 0, 4))
    write(run, 6, recorded(order, 1, 2, 6))  # the checkpoint of step 4 was damaged, so the run went back to step 2
    assert list(ledger.read(run)) == [1, 2, 3, 4, 5, 6]
    other = replace(order, seed=1)
    write(run, 6, recorded(other, 1, 2, 6))
    with pytest.raises(TrainingError, match=re.escape("step_00000006.jsonl: step 3 used other samples")):
        ledger.read(run)
