"""`data.cache: off`: rows made on the fly are those of the cache bit by bit, and nothing changed passes for them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ft import paths
from ray_ft import recipe as recipes
from ray_ft.data import prepare as module
from ray_ft.data import sources, stream
from ray_ft.data import work as works
from ray_ft.data.order import Order
from ray_ft.data.prepare import load, prepare
from ray_ft.data.prepared import Prepared
from ray_ft.data.render import Renderer
from ray_ft.data.stream import Batch, local_batches
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError, ModelError
from ray_ft.recipe import Recipe

Mixture = Callable[..., tuple[Recipe, Prepared]]


def line(kind: str, number: int) -> dict[str, Any]:
    return {"text": f"{kind} {number}: " + "one two three " * (1 + number % 7)}


@pytest.fixture
def mixture(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Mixture:
    """Three sources (JSONL of many chunks with bad lines, gzip of many segments, Parquet), prepared as asked for."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2500)
    monkeypatch.setattr(works, "SEGMENT_TOKENS", 600)
    monkeypatch.setattr(works, "ENCODE_BATCH", 8)
    rows = [json.dumps(line("plain", n)) for n in range(150)]
    rows[3:3] = ["", "{", "null"]
    (tmp_path / "plain.jsonl").write_text("\n".join(rows))
    packed = "".join(json.dumps(line("packed", n)) + "\n" for n in range(120))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    table = pa.Table.from_pylist([line("table", n) for n in range(60)])
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=10)
    texts = [
        {"format": "text", "path": str(tmp_path / name), "weight": weight}
        for name, weight in (("plain.jsonl", 1.0), ("packed.jsonl.gz", 0.5), ("table.parquet", 2.0))
    ]

    def mixture(*overrides: str, storage: str = "runs") -> tuple[Recipe, Prepared]:
        common = (f"run.storage={tmp_path / storage}", "data.seq_len=64", "data.shuffle_window=1200")
        recipe = make_recipe(*common, "data.max_bad_rows=1", "train.epochs=2", *overrides, sources=texts)
        return recipe, prepare(recipe, "train", demo.base, stream.in_process)

    return mixture


def batches(recipe: Recipe, prepared: Prepared, start: int = 0) -> list[Batch]:
    order = Order.of(recipe, prepared)
    return list(local_batches(order, start, order.rows // 4 * 4, 0, 1, 4))


def assert_equal(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert (a.first, a.samples) == (b.first, b.samples)
        np.testing.assert_array_equal(a.rows.input_ids, b.rows.input_ids)
        np.testing.assert_array_equal(a.rows.flags, b.rows.flags)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the tokenizer was given, from here on."""
    real, found = Renderer.encode, list[str]()

    def encode(self: Renderer, samples: Any) -> Any:
        found.extend(sample.answer for sample in samples)
        return real(self, samples)

    monkeypatch.setattr(Renderer, "encode", encode)
    return found


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_rows_and_names_are_those_of_the_cache_bit_by_bit(mixture: Mixture, shuffle: str) -> None:
    options = ("data.ledger=true", f"data.shuffle={shuffle}")
    recipe, cached = mixture(*options, storage="kept")
    recipe_off, off = mixture(*options, "data.cache=off", storage="light")
    assert paths.list_dir(off.location) == ["rejects.jsonl", "stats.json"]
    assert "shards" in paths.list_dir(cached.location)
    assert paths.base_name(off.location) == paths.base_name(cached.location)  # a run may change between the two
    assert (off.units, off.origins, off.counts) == (cached.units, cached.origins, cached.counts)
    assert max(unit.group for unit in off.units) > 3 and len({unit.chunk for unit in off.units}) > 6
    assert Path(off.rejects).read_bytes() == Path(cached.rejects).read_bytes()
    for start in (0, 52):
        assert_equal(batches(recipe, cached, start), batches(recipe_off, off, start))


def test_resuming_tokenizes_no_chunk_that_is_done(mixture: Mixture, encoded: list[str]) -> None:
    recipe, off = mixture("data.cache=off", "data.shuffle=false", "train.epochs=1", "data.shuffle_window=64")
    assert len(encoded) == 330
    encoded.clear()
    whole = batches(recipe, off)
    everything = len(encoded)
    order = Order.of(recipe, off)
    at = order.rows * 3 // 4 // 4 * 4
    encoded.clear()
    rest = batches(recipe, off, at)
    assert_equal(rest, whole[at // 4 :])
    consumed = {unit.chunk for part in order.slices(0, at) for unit, _, _ in part.parts_read()}
    left = {unit.chunk for part in order.slices(at, order.rows) for unit, _, _ in part.parts_read()}
    assert len(consumed - left) > 4 and len(encoded) < everything / 2
    assert not [text for text in encoded if text.startswith("plain")]  # of the source that was done


def test_a_unit_is_made_without_tokenizing_those_before_it(
    mixture: Mixture, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, off = mixture("data.cache=off")
    unit = max((unit for unit in off.units if unit.source == 1), key=lambda unit: unit.group)
    assert unit.group > 3 and unit.first > 60
    encoded.clear()
    rows = off.read([unit])
    assert len(rows) == unit.rows and len(encoded) <= 120 - unit.first + 1
    neighbours = [one for one in off.units if one.chunk == unit.chunk]
    passes: list[Any] = []
    real = sources.read_rows
    monkeypatch.setattr(sources, "read_rows", lambda *args: passes.append(args) or real(*args))
    off.read(neighbours[1:4])
    assert len(passes) == 1  # over the compressed file, for units that follow one another


def test_two_epochs_are_read_without_anything_being_kept(mixture: Mixture) -> None:
    recipe, off = mixture("data.cache=off")
    batches(recipe, off)
    assert paths.list_dir(off.location) == ["rejects.jsonl", "stats.json"]


# ------------------------------------------------------------------------------------------- changing between the two


def test_tokens_that_are_there_are_used_and_missing_ones_are_made(
    mixture: Mixture, encoded: list[str], tmp_path: Path
) -> None:
    recipe, off = mixture("data.cache=off")
    expected = batches(recipe, off)
    again_off = mixture("data.cache=off")[1]
    assert again_off.reused and again_off.render is not None
    kept = mixture()[1]
    assert not kept.reused and kept.render is None and "shards" in paths.list_dir(kept.location)
    assert (kept.location, kept.units) == (off.location, off.units)
    recipe, found = mixture("data.cache=off")
    assert found.reused and found.render is None
    encoded.clear()
    for file in tmp_path.glob("*.jsonl*"):
        file.unlink()
    assert_equal(batches(recipe, found), expected)
    assert not encoded


def test_held_out_rows_are_kept_as_they_are_read_again_and_again(
    make_recipe: Callable[..., Recipe], demo: DemoPaths
) -> None:
    held_out = prepare(make_recipe("data.cache=off"), "eval", demo.base, stream.in_process)
    assert held_out.render is None and "shards" in paths.list_dir(held_out.location)


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_file_that_changed_since_is_refused_by_name(mixture: Mixture, tmp_path: Path) -> None:
    recipe, off = mixture("data.cache=off")
    file = tmp_path / "plain.jsonl"
    size = file.stat().st_size
    os.utime(file, ns=(0, 1_793_538_309_000_000_000))
    with pytest.raises(DataError, match=r"plain\.jsonl changed since it was prepared: ") as caught:
        batches(recipe, off)
    assert f"{size:,} bytes of 20" in caught.value.what
    assert f"→ {size:,} bytes of 2026-11-01 13:05:09 UTC" in caught.value.what
    file.unlink()
    with pytest.raises(DataError, match=r"plain\.jsonl is gone"):
        batches(recipe, off)


def test_an_index_is_found_again_by_those_who_have_the_run(mixture: Mixture, demo: DemoPaths, tmp_path: Path) -> None:
    recipe, off = mixture("data.cache=off")
    found = load(off.location, recipe, "train", demo.base)
    assert found is not None and found.units == off.units
    assert_equal(batches(recipe, found)[:2], batches(recipe, off)[:2])
    (tmp_path / "plain.jsonl").rename(tmp_path / "plain-2.jsonl")
    content = recipe.model_dump(mode="json")
    content["data"]["train"] = [{"format": "text", "path": str(tmp_path / "*.jsonl")}]
    with pytest.raises(DataError, match=r"plain\.jsonl is gone, and its tokens are not stored"):
        load(off.location, recipes.parse(content), "train", demo.base)
    paths.write_json(paths.join(off.location, "stats.json"), {"format": 1, "units": []})  # as older versions wrote it
    assert load(off.location, recipe, "train", demo.base) is None


@pytest.mark.parametrize("lines", [0, 1])
def test_other_content_under_the_same_size_and_time_is_refused_where_it_gives_other_rows(
    mixture: Mixture, tmp_path: Path, lines: int
) -> None:
    _, off = mixture("data.cache=off")
    assert off.units[0].rows > 1
    file = tmp_path / "plain.jsonl"
    before = file.stat()
    kept = b"".join(file.read_bytes().splitlines(keepends=True)[:lines])
    file.write_bytes(kept.ljust(before.st_size, b"\n"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"plain\.jsonl gives other rows than when it was prepared"):
        off.read(off.units[:1])


def test_another_tokenizer_in_the_same_folder_is_refused(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch, demo: DemoPaths
) -> None:
    recipe, off = mixture("data.cache=off")
    known = works.tokenizer_identity(demo.base, False)
    monkeypatch.setattr(module, "tokenizer_identity", lambda model, code: {**known, "tokenizer": "another"})
    with pytest.raises(ModelError, match="is not the one that the data was prepared with"):
        batches(recipe, off)


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_file_that_changes_while_it_is_prepared_is_an_error_and_nothing_is_kept(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path, cache: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(line("row", 1)) + "\n")
    recipe = make_recipe(f"data.cache={cache}", sources=[{"format": "text", "path": str(file)}])

    def slowly(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        done = [function(item) for item in items]
        with file.open("a") as stream:
            stream.write(json.dumps(line("row", 2)) + "\n")
        return done

    with pytest.raises(DataError, match=r"data changed while it was prepared: .*data\.jsonl: \d+ bytes of .* → \d+ by"):
        prepare(recipe, "train", demo.base, slowly)
    assert not [path for path in Path(recipe.run.storage).rglob("*") if path.is_file()]
    assert prepare(recipe, "train", demo.base, stream.in_process).counts.rows == 2


def test_a_file_that_goes_while_it_is_prepared_is_named_and_nothing_is_kept(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(line("row", 1)) + "\n")
    recipe = make_recipe(sources=[{"format": "text", "path": str(file)}])

    def then_gone(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        done = [function(item) for item in items]
        file.unlink()
        return done

    with pytest.raises(DataError, match=r"data changed while it was prepared: .*data\.jsonl is gone"):
        prepare(recipe, "train", demo.base, then_gone)
    assert not [path for path in Path(recipe.run.storage).rglob("*") if path.is_file()]
