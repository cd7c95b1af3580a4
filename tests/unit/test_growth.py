"""What would grow faster than the work does not, and still says what the plain way says."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ft import artifacts
from ray_ft.data import identity, parquet, prepare, sources
from ray_ft.data.counts import Counts
from ray_ft.data.files import File
from ray_ft.data.order import Order, Part
from ray_ft.data.prepared import Prepared, Unit
from ray_ft.data.sources import Chunk
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError
from ray_ft.recipe import Recipe
from ray_ft.report import reading
from ray_ft.span import Span
from ray_ft.train import checkpoint, shards
from ray_ft.tune.rungs import Rungs

# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Twenty committed checkpoints and a newer one without its marker."""
    for step in range(1, 22):
        where = str(tmp_path / checkpoint.name(step))
        written = shards.write(where, 0, {"model/a": Span(torch.zeros(4), 0, (4,))})
        if step < 21:
            checkpoint.commit(where, step, [written], {})
    return str(tmp_path)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints of which anything was asked, request by request."""
    found: list[str] = []
    for name in ("is_committed", "verify"):
        real = getattr(checkpoint, name)
        monkeypatch.setattr(checkpoint, name, lambda location, real=real: found.append(location) or real(location))
    return found


def test_the_newest_is_found_without_a_look_at_older_ones(folder: str, looked_at: list[str]) -> None:
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == 20
    assert {Path(location).name for location in looked_at} == {checkpoint.name(20), checkpoint.name(21)}
    looked_at.clear()
    assert checkpoint.newest_step(folder) == 20 == max(checkpoint.steps(folder))
    assert checkpoint.newest_step(f"{folder}/nothing") == 0


def test_where_nothing_can_go_retention_reads_nothing(folder: str, looked_at: list[str]) -> None:
    checkpoint.retain(folder, 21)
    assert looked_at == []
    checkpoint.retain(folder, 3)
    assert checkpoint.steps(folder) == [18, 19, 20]


def test_of_an_index_the_runs_between_two_elements_are_those_that_overlap() -> None:
    rng = random.Random(0)
    ends = [0, *sorted(rng.sample(range(1, 100), 9)), 100]
    pieces = [(f"file-{at}", ends[at], ends[at + 1], [at]) for at in range(10)]
    stored = shards.Stored((100,), torch.float32, pieces, {f"file-{at}": {"header": [8, at]} for at in range(10)}, 16)
    for low in range(100):
        for high in range(low + 1, 101):
            wanted = [run for run in stored.runs if max(run.start, low) < min(run.stop, high)]
            assert list(stored.between(low, high)) == wanted


# -------------------------------------------------------------------------------------------------------------- order


def index_of(sizes: list[list[int]]) -> Prepared:
    flat = [(source, rows) for source, units in enumerate(sizes) for rows in units]
    units = tuple(Unit(at, 0, rows, source) for at, (source, rows) in enumerate(flat))
    return Prepared("nowhere", 8, Counts(packed=sum(rows for _, rows in flat)), units, ())


def greedy(order: Order, epoch: int) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """Windows of an epoch that is not shuffled, cut as they come: (rows of the epoch before it, parts)."""
    before, rows = 0, 0
    window: list[Part] = []
    for source in order._sources:
        for part in source.parts(source.start(epoch), source.start(epoch + 1)):
            size = part.high - part.low
            if window and rows + size > order._window:
                yield before, tuple(window)
                before, window, rows = before + rows, [], 0
            window.append(part)
            rows += size
    if window:
        yield before, tuple(window)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_an_unshuffled_order_is_cut_as_it_always_was_from_wherever_one_begins(
    sizes: list[list[int]], weight: float, window: int
) -> None:
    order = Order(index_of(sizes), 0, False, window, 3, (weight,))
    for epoch in (2, 0, 1):
        whole = list(greedy(order, epoch))
        for offset in range(order.start(epoch + 1) - order.start(epoch)):
            at = max(n for n, (before, _) in enumerate(whole) if before <= offset)
            found = [(before, parts) for _, before, parts in order._plain(epoch, offset)]
            assert found == whole[at:]


def test_an_unshuffled_order_is_cut_once_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(index_of([[3] * 50, [2] * 50]), 0, False, 9, 1)
    cuts: list[int] = []
    real = Order._cut_plainly
    monkeypatch.setattr(Order, "_cut_plainly", lambda self, epoch: cuts.append(epoch) or real(self, epoch))
    found = [int(source) for first in range(0, 250, 2) for source in order.sources(first, first + 2)]
    assert found == [0] * 150 + [1] * 100
    assert cuts == [0]


# ----------------------------------------------------------------------------------------------------------- identity


def test_files_that_all_changed_their_names_are_told_without_comparing_each_with_each() -> None:
    class Name(str):
        """Counts how often two are compared."""

        compared = 0
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    count = 400
    old, new = ([[0, Name(f"{kind}-{at}"), "1-1", ""] for at in range(count)] for kind in "ab")
    lines = identity._of_files(old, new)
    assert len(lines) == 2 * count
    assert lines[0] == "a-0 is gone"
    assert lines[-1] == "b-99 is new"
    assert Name.compared < 20 * count * math.log2(count)  # sorting; each with each would be 160,000 and more


def test_a_file_that_moved_to_another_source_is_told_once() -> None:
    old = [[0, "a", "1-1", ""], [0, "b", "1-1", ""]]
    assert identity._of_files(old, [[1, "a", "1-1", ""], [0, "b", "1-1", ""]]) == ["a was of source 0, is of 1"]


# -------------------------------------------------------------------------------------------------------------- rungs


class Plainly(Rungs):
    """Counts and compares anew each time."""

    def _rank(self, rung: int, number: int) -> int:
        own = (self._values[rung][number], number)
        return sum((value, one) < own for one, value in self._values[rung].items() if one not in self._failed)

    def _complete(self, rung: int) -> bool:
        here = self._values[rung].keys() | self._gone
        if rung == 0:
            return len(here) >= self.expected
        if not self._complete(rung - 1):
            return False
        below = self._values[rung - 1]
        going = self._promoted[rung - 1] | {
            number for number in below.keys() - self._failed if self._rank(rung - 1, number) < self._quota(len(below))
        }
        return going <= here


@pytest.mark.parametrize("seed", range(20))
def test_rungs_that_remember_decide_as_those_that_count_anew(seed: int) -> None:
    rng = random.Random(seed)
    count = 24
    both = [kind(count, 1 / 16, 4, 1) for kind in (Rungs, Plainly)]
    standing = dict.fromkeys(range(count), 0.0)
    for _ in range(150):
        number = rng.randrange(count)
        what = rng.random()
        for rungs in both:
            if what < 0.6:
                rungs.arrived(number, standing[number] + 1 / 16, (number * 7) % 5 if number % 6 else math.nan)
            elif what < 0.8:
                rungs.promote(number)
            elif what < 0.95:
                rungs.gone(number, failed=number % 3 == 0, finished=number % 7 == 0)
            else:
                rungs.close()
        standing[number] += (what < 0.6) / 16
        verdicts = [[rungs.verdict(one) for one in range(count)] for rungs in both]
        assert verdicts[0] == verdicts[1]


# -------------------------------------------------------------------------------------------------------- many files


def chunks_of(sizes: list[int]) -> list[Chunk]:
    files = [File(f"part-{at}.jsonl", "jsonl", None, size, "1-1") for at, size in enumerate(sizes)]
    return [chunk for file in files for chunk in sources.chunks_of(file, 0)]


@given(st.lists(st.sampled_from([10, 1000, sources.CHUNK_BYTES, 3 * sources.CHUNK_BYTES]), max_size=60))
def test_small_neighbours_are_one_tasks_and_keep_numbers_and_order(sizes: list[int]) -> None:
    chunks = chunks_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "TASKS", 8)
        groups = prepare._grouped(chunks)
    assert [pair for group in groups for pair in group] == list(enumerate(chunks))
    for group in groups:
        assert len(group) <= max(len(chunks) // 8, 1)
        assert len(group) == 1 or sum(chunk.stop - chunk.start for _, chunk in group) <= sources.CHUNK_BYTES


def test_up_to_a_number_of_chunks_each_has_a_task_of_its_own() -> None:
    assert {len(group) for group in prepare._grouped(chunks_of([10] * prepare.TASKS))} == {1}
    assert len(prepare._grouped(chunks_of([10] * 10_000))) <= 2 * prepare.TASKS


def test_rows_prepared_by_few_tasks_are_those_of_a_task_for_each_file(
    make_recipe: Callable[..., Recipe], tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for at in range(12):
        lines = [json.dumps({"text": f"row {at} {line}"}) for line in range(1 + at % 3)] + ["not JSON"] * (at % 2)
        (folder / f"{at:02d}.jsonl").write_text("\n".join(lines) + "\n")
    tasks: list[int] = []

    def spread(function: Callable[[Any], Any], items: Any) -> Any:
        tasks.append(len(items))
        return map(function, items)

    found = []
    for number, most in enumerate((prepare.TASKS, 3)):
        monkeypatch.setattr(prepare, "TASKS", most)
        recipe = make_recipe(f"run.storage={tmp_path}/runs-{number}", sources=[{"format": "text", "path": str(folder)}])
        made = prepare.prepare(recipe, "train", demo.base, spread)
        files = sorted(file for file in Path(made.location).rglob("*") if file.is_file())
        found.append({file.relative_to(made.location): file.read_bytes() for file in files})
    assert tasks == [12, 3]
    assert found[0] == found[1]


def test_a_parquet_file_is_opened_once_for_columns_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for at in range(20):
        where = tmp_path / f"{at}.parquet"
        pq.write_table(pa.table({"text": [f"row {at}"]}), where)
        files.append(File(str(where), "parquet", None, where.stat().st_size, f"{where.stat().st_mtime_ns}"))
    (tmp_path / "bad.parquet").write_bytes(b"none")
    bad = File(str(tmp_path / "bad.parquet"), "parquet", None, 4, "4-1")
    opened: list[str] = []
    real = parquet._open
    monkeypatch.setattr(parquet, "_open", lambda file: opened.append(file.uri) or real(file))
    parquet.read_footers([*files, bad])  # what it does not say is said below
    assert [parquet.parquet_columns(file) for file in files] == [["text"]] * 20
    assert all(len(parquet.row_group_bytes(file)) == 1 for file in files)
    assert sorted(opened) == sorted(file.uri for file in [*files, bad])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        parquet.parquet_columns(bad)


# ------------------------------------------------------------------------------------------------------------- report


def test_names_of_columns_are_looked_through_for_credentials_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "s3://key:secretsecret@bucket/run"
    record = reading.Record(artifacts.RunDir(uri), [uri], {}, "", None)
    asked: list[str] = []
    real = reading.without_secrets
    monkeypatch.setattr(reading, "without_secrets", lambda text, one: asked.append(text) or real(text, one))
    rows = [record.clean({"step": step, "loss": 1.0, "said": f"at {uri}"}) for step in range(50)]
    assert rows[0] == rows[-1] | {"step": 0} == {"step": 0, "loss": 1.0, "said": "at s3://bucket/run"}
    assert sorted(asked) == sorted(["step", "loss", "said", f"at {uri}"])
    long = f"{uri} " * 9
    assert "secretsecret" not in record.clean(long)
    assert long not in record._cleaned
