"""The order of rows: each once per epoch, from data, recipe and seed alone, whoever asks and however they cut it."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_ft.data import sources
from ray_ft.data import work as works
from ray_ft.data.counts import Counts
from ray_ft.data.order import ORDER, Order, Part, Passes, as_fraction
from ray_ft.data.pack import REAL, START, Rows
from ray_ft.data.prepare import prepare
from ray_ft.data.prepared import Loaded, Prepared, Unit
from ray_ft.data.render import load_tokenizer
from ray_ft.data.stream import in_process, local_batches
from ray_ft.demo import DemoPaths
from ray_ft.recipe import Recipe

PADDING = -1


@dataclass(frozen=True)
class Numbered(Prepared):
    """Prepared rows in memory: row n holds the number n, so that an order can be read from it."""

    first: dict[Unit, int] = field(default_factory=dict)
    read_units: list[Unit] = field(default_factory=list)

    @classmethod
    def of(cls, *sizes: list[int]) -> Numbered:
        """Rows of the units of each source."""
        flat = [(source, rows) for source, units in enumerate(sizes) for rows in units]
        units = tuple(Unit(at // 2, at % 2, rows, source) for at, (source, rows) in enumerate(flat))
        first = dict(zip(units, np.cumsum([0, *(rows for _, rows in flat)]).tolist(), strict=False))
        return cls("nowhere", 8, Counts(packed=sum(map(sum, sizes))), units, (), first=first)

    def segments(self, units: Sequence[Unit], *, tokens: bool, samples: bool) -> Iterator[Loaded]:
        self.read_units.extend(units)
        for unit in units:
            numbers = np.arange(self.first[unit], self.first[unit] + unit.rows)
            ids = np.repeat(numbers[:, None], 8, axis=1).astype(np.int32)
            rows = Rows(ids, np.full(ids.shape, START, np.uint8)) if tokens else None
            yield Loaded(rows, [(f"rows:{number}",) for number in numbers] if samples else None)

    def source_of(self, row: int) -> int:
        return next(unit.source for unit, first in self.first.items() if first <= row < first + unit.rows)


def sequence(order: Order, start: int, stop: int) -> list[int]:
    """The rows at positions [start, stop)."""
    found: list[int] = []
    for part in order.slices(start, stop):
        assert part.position == start + len(found)
        assert all(0 <= one.low < one.high <= one.unit.rows for one in part.parts)
        rows, names = part.read_named(order.prepared)
        assert len(rows) == len(names) == part.take > 0
        numbers = rows.input_ids[:, 0].tolist() if part.parts else [PADDING] * len(rows)
        assert names == [(f"rows:{n}",) if n != PADDING else ("padding",) for n in numbers]
        found += numbers
    return found


def epochs_of(order: Order) -> list[list[int]]:
    return [sequence(order, order.start(epoch), order.start(epoch + 1)) for epoch in range(order.epochs)]


#: A busy machine is no fault of the order.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)
WEIGHTS = st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.7])
MIXTURE = st.lists(st.tuples(SIZES, WEIGHTS), min_size=1, max_size=4)


@unhurried
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


@unhurried
@given(mixture=MIXTURE, shuffle=st.booleans(), window=st.integers(1, 30), data=st.data())
def test_the_order_does_not_depend_on_where_it_is_cut(
    mixture: list[tuple[list[int], float]], shuffle: bool, window: int, data: st.DataObject
) -> None:
    sizes, weights = zip(*mixture, strict=True)
    order = Order(Numbered.of(*sizes), 3, shuffle, window, 2, weights)
    end = order.rows + 5  # some padding too
    cuts = sorted(data.draw(st.lists(st.integers(0, end), max_size=5)))
    pieces = [sequence(order, a, b) for a, b in zip([0, *cuts], [*cuts, end], strict=True)]
    assert [row for piece in pieces for row in piece] == sequence(order, 0, end)


@unhurried
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


def test_the_order_of_this_version_stays_as_it_is() -> None:
    """Raise `order.ORDER` with these numbers: a run begun before would go on with other rows."""
    order = Order(Numbered.of([5, 4, 3], [4]), 7, True, 6, 2, (0.5, 2.0))
    assert ORDER == 2
    assert epochs_of(order) == [
        [2, 15, 1, 13, 12, 13, 14, 4, 3, 12, 0, 14, 15, 10],
        [12, 14, 9, 15, 11, 12, 8, 7, 13, 13, 14, 6, 5, 15],
    ]


def test_epochs_are_shuffled_anew() -> None:
    order = Order(Numbered.of([7, 5, 9, 4]), 0, True, 100, 3)
    epochs = [tuple(sequence(order, 25 * epoch, 25 * epoch + 25)) for epoch in range(3)]
    assert len(set(epochs)) == 3
    windows = Order(Numbered.of([4] * 40), 0, True, 16, 3)
    first = [frozenset(part.unit for part in next(windows.slices(at, at + 16)).parts) for at in (0, 160, 320)]
    assert len(set(first)) == 3  # units too, not only rows within a window


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
    assert len(windows) == 17 and all(part.take <= 12 for part in windows)
    together = {frozenset(prepared.first[part.unit] // 4 for part in window.parts) for window in windows}
    assert len(together & {frozenset((at, at + 1, at + 2)) for at in range(48)}) < 3  # drawn from anywhere
    found = sequence(order, 0, 200)
    assert all(
        [row // 4 for row in found[at : at + 12]] != sorted(row // 4 for row in found[at : at + 12])
        for at in range(0, 180, 12)
    )  # and rows are mixed within a window


def test_a_window_holds_at_least_one_unit() -> None:
    """One is read whole, so that a smaller window would only read it more often."""
    order = Order(Numbered.of([9, 2, 2, 9]), 0, True, 4, 1)
    assert [part.take for part in order.slices(0, 22)] == [7, 7, 8]


@unhurried
@given(sizes=SIZES, shuffle=st.booleans(), position=st.integers(0, 200))
def test_locate_names_the_row_at_a_position(sizes: list[int], shuffle: bool, position: int) -> None:
    order = Order(Numbered.of(sizes), 1, shuffle, 12, 2)
    (row,) = sequence(order, position, position + 1)
    assert order.locate(position) == (["padding"] if row == PADDING else [f"rows:{row}"])


# ------------------------------------------------------------------------------------------------------ mixtures


@unhurried
@given(mixture=MIXTURE, shuffle=st.booleans(), window=st.integers(1, 30), seed=st.integers(0, 3))
def test_each_pass_over_a_source_uses_each_of_its_rows_once_across_epochs(
    mixture: list[tuple[list[int], float]], shuffle: bool, window: int, seed: int
) -> None:
    sizes, weights = zip(*mixture, strict=True)
    prepared = Numbered.of(*sizes)
    order = Order(prepared, seed, shuffle, window, 6, weights)
    epochs = epochs_of(order)
    assert sum(map(len, epochs)) == order.rows
    for source, (units, weight) in enumerate(mixture):
        rows = [
            unit_first + at
            for unit, unit_first in prepared.first.items()
            if unit.source == source
            for at in range(unit.rows)
        ]
        taken = 0
        used: Counter[int] = Counter()
        for epoch, found in enumerate(epochs, start=1):
            mine = [row for row in found if row in rows]
            used.update(mine)
            taken += len(mine)
            assert taken == int(epoch * as_fraction(weight) * sum(units))  # to a row, after every epoch
            often = [used[row] for row in rows]
            assert max(often) - min(often) <= 1  # no row stands twice before every row has stood once


@unhurried
@given(mixture=MIXTURE, shuffle=st.booleans(), window=st.integers(1, 30))
def test_the_source_of_each_position_is_that_of_its_row(
    mixture: list[tuple[list[int], float]], shuffle: bool, window: int
) -> None:
    sizes, weights = zip(*mixture, strict=True)
    prepared = Numbered.of(*sizes)
    order = Order(prepared, 1, shuffle, window, 2, weights)
    stop = order.rows + 3  # padding at the end
    rows = sequence(order, 0, stop)
    expected = [-1 if row == PADDING else prepared.source_of(row) for row in rows]
    assert order.sources(0, stop).tolist() == expected
    assert order.sources(2, min(7, stop)).tolist() == expected[2:7]
    assert order.source_numbers == tuple(range(len(sizes)))


def test_half_of_a_source_in_each_epoch_is_all_of_it_in_two() -> None:
    prepared = Numbered.of([6, 5], [40])
    one, two, three, _ = epochs_of(Order(prepared, 0, True, 20, 4, (0.5, 1.0)))
    first, second, third = ([row for row in epoch if row < 11] for epoch in (one, two, three))
    assert (len(first), len(second)) == (5, 6)
    assert sorted(first + second) == list(range(11))
    assert sorted(first) != sorted(third)  # the next pass is another permutation
    assert sorted(first) not in ([0, 1, 2, 3, 4], [6, 7, 8, 9, 10])  # rows of a cut unit are drawn, not its first ones


@pytest.mark.parametrize("weight", [1 / 3, 0.33333, 0.1, 0.3, 0.7, 2.1])
def test_weights_are_exact_over_as_many_epochs_as_their_denominator(weight: float) -> None:
    fraction = as_fraction(weight)
    assert fraction.denominator in (3, 10) and abs(fraction - weight) < 1e-5
    order = Order(Numbered.of([7, 30]), 0, True, 10, fraction.denominator, (weight,))
    assert set(Counter(sequence(order, 0, order.rows)).values()) == {fraction.numerator}
    assert order.rows == 37 * fraction.numerator


def test_shares_are_not_reckoned_in_floats() -> None:
    assert int(0.29 * 100) == 28 and int(0.57 * 100) == 56
    assert [Order(Numbered.of([100]), 0, True, 10, 1, (weight,)).rows for weight in (0.29, 0.57)] == [29, 57]


def test_a_weight_far_below_one_is_no_zero() -> None:
    assert [as_fraction(weight) for weight in (1e-5, 0.00025, 1, 20.0)] == [
        Fraction(1, 10**5),
        Fraction(1, 4000),
        1,
        20,
    ]


def test_a_source_used_twice_an_epoch_and_one_without_rows() -> None:
    prepared = Numbered.of([5], [], [20])
    order = Order(prepared, 0, True, 10, 1, (2.0, 9.0, 1.0))
    assert Counter(sequence(order, 0, order.rows)) == {**dict.fromkeys(range(5), 2), **dict.fromkeys(range(5, 25), 1)}


def test_every_window_holds_the_sources_in_proportion() -> None:
    prepared = Numbered.of([50] * 12, [20] * 5, [3])
    order = Order(prepared, 0, True, 64, 2, (1.0, 2.0, 1.0))
    for epoch in (0, 1):
        windows = list(order.slices(order.start(epoch), order.start(epoch + 1)))
        assert len(windows) == 13  # 600 + 200 + 3 rows
        for window in windows:
            held = Counter(prepared.source_of(row) for row in window.read(prepared).input_ids[:, 0].tolist())
            for source, rows in enumerate((600, 200, 3)):
                assert abs(held[source] - rows / 13) < 1
            assert window.take <= 64 + 2


def test_rows_of_a_mixture_are_mixed_within_the_window() -> None:
    prepared = Numbered.of([32], [32])
    found = [prepared.source_of(row) for row in sequence(Order(prepared, 0, True, 64, 1), 0, 64)]
    assert 16 < sum(a != b for a, b in pairwise(found)) < 48


def test_without_shuffle_a_weight_goes_on_where_the_epoch_before_stopped() -> None:
    order = Order(Numbered.of([2, 2], [3]), 0, False, 10, 3, (0.5, 1.0))
    assert sequence(order, 0, order.rows) == [0, 1, 4, 5, 6, 2, 3, 4, 5, 6, 0, 1, 4, 5, 6]


def test_a_unit_that_a_slice_needs_twice_is_read_once_and_one_it_does_not_need_not_at_all() -> None:
    prepared = Numbered.of([4], [20] * 3)
    order = Order(prepared, 0, True, 100, 1, (5.0, 1.0))
    sequence(order, 0, 80)
    assert sorted(prepared.read_units, key=prepared.first.__getitem__) == list(prepared.units)
    prepared.read_units.clear()
    (part,) = order.slices(79, 80)
    part.read(prepared)
    assert len(prepared.read_units) == 1


def test_resuming_looks_at_no_window_before_the_one_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Numbered.of([4] * 200, [4] * 10)
    order = Order(prepared, 0, True, 40, 5, (1.0, 4.0))
    at = order.start(4) + 500
    real, made = Passes.parts, []

    def parts(self: Passes, low: int, high: int) -> Iterator[Part]:
        made.append((low, high))
        return real(self, low, high)

    monkeypatch.setattr(Passes, "parts", parts)
    sequence(order, at, at + 40)
    assert len(made) <= 2 * 3  # of two sources, for two windows and the one behind the last
    assert len(prepared.read_units) <= 2 * 14  # each window has a cut unit more at both ends of each source


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_hundred_thousand_units_are_sliced_in_seconds_and_little_memory(shuffle: bool) -> None:
    generator = np.random.default_rng(0)
    sizes = [generator.integers(500, 2048, 50_000).tolist() for _ in range(2)]
    units = tuple(
        Unit(number, 0, rows, source) for source, units in enumerate(sizes) for number, rows in enumerate(units)
    )
    prepared = Prepared("nowhere", 1024, Counts(packed=sum(map(sum, sizes))), units, ())
    order = Order(prepared, 0, shuffle, 7812, 2, (1.0, 0.3))
    tracemalloc.start()
    began = time.process_time()
    assert sum(part.take for part in order.slices(order.start(1), order.rows)) == order.rows - order.start(1)
    took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 20 and peak < 64 << 20, (took, peak)  # measured: a tenth of either
    began = time.process_time()
    next(order.slices(order.rows - 1000, order.rows))
    assert time.process_time() - began < (2 if shuffle else 10)  # measured: 0.1 and 0.9


def test_passes_over_each_source_are_told_for_the_whole_run() -> None:
    prepared = Numbered.of([30] * 10, [3])
    order = Order(prepared, 0, True, 40, 4, (1.0, 5.0))
    assert order.passes() == {0: 4.0, 1: 20.0}
    half = order.passes(order.rows // 2)
    assert half == pytest.approx({0: 2.0, 1: 10.0})
    assert order.passes(0) == {0: 0.0, 1: 0.0}
    used = Counter(prepared.source_of(row) for row in sequence(order, 0, 400))
    assert order.passes(400) == pytest.approx({0: used[0] / 300, 1: used[1] / 3}, rel=0.1)
    assert order.passes_lines() == [
        "passes over the whole run: data.train.0: 4, data.train.1: 20",
        "data.train.1: each of its 3 packed rows is trained on about 20 times",
    ]
    plain = Order(prepared, 0, False, 40, 4, (1.0, 5.0))
    assert plain.passes(310) == {0: 1.0, 1: 10 / 3}
    assert Order(Numbered.of([30]), 0, True, 40, 4).passes_lines() == []
    assert len(Order(Numbered.of([30]), 0, True, 40, 12).passes_lines()) == 2


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
    assert len(blank) == 2 and not any((rows.flags & REAL).any() for rows in blank)


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def prepared_demo(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Recipe], Prepared]:
    """The demo's rows in a dozen units, of several shards."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 12_000)
    monkeypatch.setattr(works, "SEGMENT_TOKENS", 1500)
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
