"""The order of rows: each once per epoch, from data, recipe and seed alone, whoever asks and however they cut it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ft.data import prepare as module
from ray_ft.data import sources
from ray_ft.data.order import Order
from ray_ft.data.pack import START, Rows
from ray_ft.data.prepare import Counts, Prepared, Unit, prepare
from ray_ft.data.render import load_tokenizer
from ray_ft.data.stream import in_process, local_batches
from ray_ft.demo import DemoPaths
from ray_ft.recipe import Recipe

PADDING = -1


@dataclass(frozen=True)
class Numbered(Prepared):
    """Prepared rows in memory: row n holds the number n, so that an order can be read from it."""

    first: dict[Unit, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes: list[int]) -> Numbered:
        units = tuple(Unit(f"{at // 2:06d}.parquet", at % 2, rows) for at, rows in enumerate(sizes))
        first = dict(zip(units, np.cumsum([0, *sizes]).tolist(), strict=False))
        return cls("nowhere", 8, Counts(packed=sum(sizes)), units, {}, first=first)

    def read(self, units: tuple[Unit, ...]) -> Rows:  # type: ignore[override]
        numbers = np.concatenate([np.arange(self.first[u], self.first[u] + u.rows) for u in units])
        return Rows(
            np.repeat(numbers[:, None], 8, axis=1).astype(np.int32), np.full((len(numbers), 8), START, np.uint8)
        )

    def names(self, unit: Unit, row: int) -> list[str]:
        return [str(self.first[unit] + row)]


def sequence(order: Order, start: int, stop: int) -> list[int]:
    """The rows at positions [start, stop)."""
    found: list[int] = []
    for part in order.slices(start, stop):
        assert part.position == start + len(found)
        rows = part.read(order.prepared)
        assert len(rows) == part.take > 0
        found += rows.input_ids[:, 0].tolist() if part.units else [PADDING] * len(rows)
    return found


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(sizes=SIZES, seed=st.integers(0, 5), shuffle=st.booleans(), window=st.integers(1, 30), epochs=st.integers(1, 3))
def test_every_row_stands_once_in_each_epoch(
    sizes: list[int], seed: int, shuffle: bool, window: int, epochs: int
) -> None:
    order = Order(Numbered.of(sizes), seed, shuffle, window, epochs)
    rows = sum(sizes)
    found = sequence(order, 0, order.rows)
    assert len(found) == rows * epochs == order.rows
    for epoch in range(epochs):
        assert sorted(found[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(sizes=SIZES, shuffle=st.booleans(), window=st.integers(1, 30), data=st.data())
def test_the_order_does_not_depend_on_where_it_is_cut(
    sizes: list[int], shuffle: bool, window: int, data: st.DataObject
) -> None:
    order = Order(Numbered.of(sizes), 3, shuffle, window, 2)
    end = order.rows + 5  # some padding too
    cuts = sorted(data.draw(st.lists(st.integers(0, end), max_size=5)))
    pieces = [sequence(order, a, b) for a, b in zip([0, *cuts], [*cuts, end], strict=True)]
    assert [row for piece in pieces for row in piece] == sequence(order, 0, end)


@given(sizes=SIZES, start=st.integers(0, 200), more=st.integers(1, 9))
def test_positions_behind_the_last_row_are_padding(sizes: list[int], start: int, more: int) -> None:
    order = Order(Numbered.of(sizes), 0, True, 10, 2)
    found = sequence(order, start, order.rows + start + more)
    assert found.count(PADDING) == min(start + more, len(found))
    assert PADDING not in found[: max(order.rows - start, 0)]


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    prepared = Numbered.of([7, 5, 9, 4])
    one, again, other = (sequence(Order(prepared, seed, True, 10, 1), 0, 25) for seed in (0, 0, 1))
    assert one == again != other
    assert one != list(range(25))


def test_epochs_are_shuffled_anew() -> None:
    order = Order(Numbered.of([7, 5, 9, 4]), 0, True, 100, 3)
    epochs = [tuple(sequence(order, 25 * epoch, 25 * epoch + 25)) for epoch in range(3)]
    assert len(set(epochs)) == 3


def test_the_order_of_earlier_epochs_does_not_depend_on_how_many_follow() -> None:
    prepared = Numbered.of([7, 5, 9, 4])
    few, many = (Order(prepared, 0, True, 10, epochs) for epochs in (1, 4))
    assert sequence(few, 0, 25) == sequence(many, 0, 25)


def test_without_shuffle_rows_come_as_prepared_in_each_epoch() -> None:
    order = Order(Numbered.of([3, 2]), 0, False, 2, 2)
    assert sequence(order, 0, 12) == [0, 1, 2, 3, 4] * 2 + [PADDING] * 2
    assert sequence(Order.once(Numbered.of([3, 2])), 0, 6) == [0, 1, 2, 3, 4, PADDING]


def test_a_window_bounds_what_is_in_memory_and_units_are_shuffled_beyond_it() -> None:
    prepared = Numbered.of([4] * 50)
    order = Order(prepared, 0, True, 12, 1)
    windows = list(order.slices(0, 200))
    assert all(sum(unit.rows for unit in part.units) <= 12 for part in windows)
    together = {frozenset(prepared.first[unit] // 4 for unit in part.units) for part in windows}
    assert len(together & {frozenset((at, at + 1, at + 2)) for at in range(48)}) < 3  # drawn from anywhere
    found = sequence(order, 0, 200)
    assert all(
        [row // 4 for row in found[at : at + 12]] != sorted(row // 4 for row in found[at : at + 12])
        for at in range(0, 192, 12)
    )  # and rows are mixed within a window


def test_the_work_grows_with_the_units_not_with_their_square() -> None:
    looks = 0

    class Counted:
        @property
        def rows(self) -> int:
            nonlocal looks
            looks += 1
            return 1

    prepared = Prepared("nowhere", 8, Counts(packed=1000), tuple(Counted() for _ in range(1000)), {})  # type: ignore[misc]
    assert [part.take for part in Order(prepared, 0, True, 400, 1).slices(0, 1000)] == [400, 400, 200]
    assert looks <= 4 * 1000


def test_a_unit_larger_than_the_window_is_a_window_of_its_own() -> None:
    order = Order(Numbered.of([9, 2, 2]), 0, True, 4, 1)
    windows = [[unit.rows for unit in part.units] for part in order.slices(0, 13)]
    assert [9] in windows and all(sum(window) <= 4 for window in windows if window != [9])


@given(sizes=SIZES, shuffle=st.booleans(), position=st.integers(0, 200))
def test_locate_names_the_row_at_a_position(sizes: list[int], shuffle: bool, position: int) -> None:
    order = Order(Numbered.of(sizes), 1, shuffle, 12, 2)
    (row,) = sequence(order, position, position + 1)
    assert order.locate(position) == (["padding"] if row == PADDING else [str(row)])


# ------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 12])
def test_the_workers_of_any_number_together_take_the_order(world: int, start: int) -> None:
    order = Order(Numbered.of([7, 5, 9, 4, 1]), 0, True, 10, 2)
    global_batch, stop = 4, start + 44
    rows = global_batch // world
    taken: dict[int, list[int]] = {}
    for rank in range(world):
        batches = list(local_batches(order, start, stop, rank, world, rows))
        assert len(batches) == 11
        for step, batch in enumerate(batches):
            assert batch.first == start + step * global_batch + rank * rows and len(batch.rows) == rows
            taken[batch.first] = batch.rows.input_ids[:, 0].tolist()
    together = [row for first in sorted(taken) for row in taken[first]]
    assert together[: order.rows - start] == sequence(order, start, stop)[: order.rows - start]
    assert len(together) == 44


def test_fewer_rows_than_workers_give_each_its_batch_and_no_row_twice() -> None:
    order = Order(Numbered.of([2]), 0, True, 10, 1)
    got = [list(local_batches(order, 0, 4, rank, 4, 1)) for rank in range(4)]
    assert [len(batches) for batches in got] == [1] * 4
    real = [batch.rows.input_ids[0, 0] for batches in got for batch in batches if batch.first < order.rows]
    assert sorted(int(row) for row in real) == [0, 1]
    blank = [batch.rows for batches in got for batch in batches if batch.first >= order.rows]
    assert len(blank) == 2 and not any((rows.flags & module.REAL).any() for rows in blank)


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def prepared_demo(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Recipe], Prepared]:
    """The demo's rows in a dozen units, of several shards."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 12_000)
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 1500)
    prepared = prepare(make_recipe(), "train", demo.base, in_process)
    assert len(prepared.units) > 8
    return make_recipe, prepared


def test_real_rows_are_those_that_locate_names(prepared_demo: tuple[Callable[..., Recipe], Prepared]) -> None:
    make_recipe, prepared = prepared_demo
    order = Order.of(make_recipe("data.shuffle_window=1000", "train.epochs=2"), prepared)
    assert order.window_rows == 1000 // 128 and order.rows == 2 * prepared.rows
    names = Counter(name for part in order.slices(0, prepared.rows) for row in part.names(prepared) for name in row)
    assert len(names) == 600 and set(names.values()) == {1}
    lines = {
        path: Path(path).read_text().splitlines()
        for path in {n.rpartition(":")[0] for n in names}
        if path.endswith("jsonl")
    }
    tokenizer = load_tokenizer(make_recipe().model.path)
    checked = 0
    for position in range(0, order.rows, 5):
        (part,) = order.slices(position, position + 1)
        decoded = tokenizer.decode(part.read(prepared).input_ids[0].tolist())
        for name in order.locate(position):
            path, _, line = name.rpartition(":")
            if path in lines:
                row = json.loads(lines[path][int(line) - 1])
                assert row["source_text"] in decoded and row["target_text"] in decoded
                checked += 1
    assert checked > 20


def test_max_steps_takes_as_many_epochs_as_it_needs(prepared_demo: tuple[Callable[..., Recipe], Prepared]) -> None:
    make_recipe, prepared = prepared_demo
    steps = 3 * prepared.rows // 8  # of 8 rows each: more than two epochs
    order = Order.of(make_recipe(f"train.max_steps={steps}"), prepared)
    assert order.epochs == 3 and order.rows >= steps * 8
    assert Order.of(make_recipe("train.max_steps=1"), prepared).epochs == 1


def test_the_order_follows_seed_and_shuffle_of_the_recipe(
    prepared_demo: tuple[Callable[..., Recipe], Prepared],
) -> None:
    make_recipe, prepared = prepared_demo

    def first(*overrides: str) -> list[list[str]]:
        order = Order.of(make_recipe("data.shuffle_window=2000", *overrides), prepared)
        return [order.locate(position) for position in range(6)]

    assert first() == first("run.seed=0") != first("run.seed=1")
    unshuffled = first("data.shuffle=false")
    assert unshuffled == first("data.shuffle=false", "run.seed=1")
    assert unshuffled == [prepared.names(prepared.units[0], row) for row in range(6)]
