"""Rows in = rows used + rows rejected, each reject at its file and line, and the same input gives the same rows."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ft import hub, paths
from ray_ft.data import prepare as module
from ray_ft.data import sources
from ray_ft.data import work as works
from ray_ft.data.counts import TOO_LONG
from ray_ft.data.pack import START, TRAINED
from ray_ft.data.prepare import Prepared, check, prepare
from ray_ft.data.render import load_tokenizer
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError, ModelError
from ray_ft.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., Prepared]
Documents = Callable[[Prepared], dict[str, list[str]]]
Text = Callable[..., dict[str, Any]]


@pytest.fixture
def run(demo: DemoPaths) -> Run:
    def run(recipe: Recipe, split: Any = "train", folder: str | None = None) -> Prepared:
        prepared = prepare(recipe, split, folder or demo.base, in_process)
        check(prepared, recipe, split, prepared.rejects)
        return prepared

    return run


@pytest.fixture
def text(tmp_path: Path) -> Text:
    """A source of plain text: a file with the given lines, an object or the bytes of a line each."""

    def text(*lines: Any, name: str = "data.jsonl") -> dict[str, Any]:
        content = b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return {"format": "text", "path": str(tmp_path / name)}

    return text


def good(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"text": f"row {first + n}: " + "one two three "[: 1 + (first + n) % 13]} for n in range(count)]


def rejects(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(prepared.rejects).read_text().splitlines()]


@pytest.fixture
def documents(demo: DemoPaths) -> Documents:
    """``file:line`` → text of every document that is on storage, by the names that the shards hold."""
    tokenizer = load_tokenizer(demo.base)

    def documents(prepared: Prepared) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for unit in prepared.units:
            rows = prepared.read([unit])
            for row in range(unit.rows):
                starts = np.flatnonzero(rows.flags[row] & START).tolist()
                names = prepared.names(unit, row)
                assert len(starts) - len(names) in (0, 1)  # padding is a document without a name
                for name, start, stop in zip(names, starts, [*starts[1:], prepared.seq_len], strict=False):
                    text = tokenizer.decode(rows.input_ids[row, start:stop].tolist(), skip_special_tokens=True)
                    found.setdefault(name, []).append(text)
        return found

    return documents


def shards(prepared: Prepared) -> dict[str, bytes]:
    folder = Path(prepared.location)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -------------------------------------------------------------------------------------------------------- counting


def test_the_demo_is_used_whole(make_recipe: MakeRecipe, run: Run, documents: Documents) -> None:
    train, held_out = run(make_recipe()), run(make_recipe(), "eval")
    assert (train.counts.rows, train.counts.used, train.counts.rejected.total()) == (600, 600, 0)
    assert (held_out.counts.rows, held_out.counts.used) == (300, 300)
    assert train.location != held_out.location
    assert rejects(train) == []
    assert 0.8 < train.non_pad_share <= 1
    assert len(documents(train)) == 600


def test_counts_are_those_of_the_rows_on_storage(make_recipe: MakeRecipe, run: Run) -> None:
    prepared = run(make_recipe())
    rows, counts = prepared.read(prepared.units), prepared.counts
    assert rows.input_ids.shape == (prepared.rows, 128) and prepared.rows == sum(u.rows for u in prepared.units)
    assert counts.tokens == int((rows.flags & works.REAL > 0).sum())
    assert counts.trained_tokens == int((rows.flags & TRAINED > 0).sum()) > 0
    assert counts.lengths.total() == 600
    assert prepared.stats()["non_pad_share"] == round(counts.tokens / rows.flags.size, 4)


BAD = [
    b'{"text": "a"',
    {"text": None},
    {"other": "a"},
    {"text": "lone \ud800"},
    b"null",
    b'["a"]',
    b'{"text": "a", "text": "b"}',
    b'{"text": "\xff"}',
    {"text": ""},
    {"text": "word " * 300},
]


@pytest.mark.parametrize("chunk_bytes", [1, 97, 1 << 20])
def test_rows_in_are_rows_used_plus_rows_rejected_each_at_its_line(
    make_recipe: MakeRecipe,
    run: Run,
    documents: Documents,
    text: Text,
    monkeypatch: pytest.MonkeyPatch,
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
    lines: list[Any] = []
    for number, bad in enumerate(BAD):
        lines += [*good(number % 4, first=10 * number), b"", bad]
    plain, zipped = text(*lines), text(*lines, name="same.jsonl.gz")
    prepared = run(make_recipe("data.max_bad_rows=1", sources=[plain, zipped]))
    counts = prepared.counts
    assert counts.rows == counts.used + counts.rejected.total() == 2 * sum(line != b"" for line in lines)
    bad_lines = [number for number, line in enumerate(lines, start=1) if line in BAD]
    expected = [(file["path"], line) for file in (plain, zipped) for line in bad_lines]
    found = rejects(prepared)
    assert [(reject["file"], reject["line"]) for reject in found] == expected
    assert Counter(reject["reason"] for reject in found) == counts.rejected
    assert [reject["reason"] for reject in found[: len(BAD)]] == [
        "invalid JSON",
        "field 'text' is null, not a string",
        "missing field 'text'",
        "field 'text' holds a lone surrogate",
        "not a JSON object",
        "not a JSON object",
        "duplicate key",
        "invalid UTF-8",
        "field 'text' is empty",
        TOO_LONG,
    ]
    assert all(reject["detail"] for reject in found if "empty" not in reject["reason"])
    # And the rows that are used are named where they stand, whole.
    used = {f"{file['path']}:{n}": line for file in (plain, zipped) for n, line in enumerate(lines, 1)}
    used = {name: line for name, line in used.items() if line != b"" and line not in BAD}
    assert documents(prepared) == {name: [line["text"]] for name, line in used.items()}


def test_two_sources_over_one_file_name_its_lines_alike(
    make_recipe: MakeRecipe, run: Run, documents: Documents, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as translation in both directions: the second reading does not count on from the first."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 60)
    source = text(*good(10), {"text": 5}, *good(3))
    prepared = run(make_recipe("data.max_bad_rows=0.5", sources=[source, source]))
    assert [reject["line"] for reject in rejects(prepared)] == [11, 11]
    lines = [line for line in range(1, 15) if line != 11]
    assert {name: len(found) for name, found in documents(prepared).items()} == {
        f"{source['path']}:{line}": 2 for line in lines
    }


def test_parquet_rows_are_named_by_their_number_in_the_file(
    make_recipe: MakeRecipe, run: Run, documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    rows = [*good(20), {"text": None}, *good(4, first=20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=6)
    prepared = run(make_recipe("data.max_bad_rows=0.5", sources=[{"format": "text", "path": f"{tmp_path}/*.parquet"}]))
    assert len({unit.shard for unit in prepared.units}) == 5
    file = f"{tmp_path}/data.parquet"
    assert [(reject["file"], reject["line"]) for reject in rejects(prepared)] == [(file, 21)]
    assert documents(prepared) == {f"{file}:{n}": [row["text"]] for n, row in enumerate(rows, 1) if row["text"]}


def test_a_chunk_is_packed_in_segments_and_loses_nothing(
    make_recipe: MakeRecipe, run: Run, documents: Documents, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "SEGMENT_TOKENS", 200)
    source = text(*good(100))
    prepared = run(make_recipe(sources=[source]))
    assert len({unit.shard for unit in prepared.units}) == 1
    assert len(prepared.units) > 3 and [unit.group for unit in prepared.units] == list(range(len(prepared.units)))
    assert documents(prepared) == {f"{source['path']}:{n}": [row["text"]] for n, row in enumerate(good(100), 1)}


def test_more_rows_than_one_call_of_the_tokenizer_takes_keep_their_lines(
    make_recipe: MakeRecipe, run: Run, documents: Documents, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "ENCODE_BATCH", 3)
    lines: list[Any] = [*good(4), b"", {"text": 1}, *good(5, first=4)]
    source = text(*lines)
    prepared = run(make_recipe("data.max_bad_rows=0.5", sources=[source]))
    assert documents(prepared) == {
        f"{source['path']}:{n}": [line["text"]] for n, line in enumerate(lines, 1) if n not in (5, 6)
    }


# ---------------------------------------------------------------------------------------------------------- length


def test_a_compressed_file_cut_short_stops_however_many_bad_rows_are_allowed(
    make_recipe: MakeRecipe, run: Run, text: Text
) -> None:
    source = text(*good(400), name="cut.jsonl.gz")
    file = Path(source["path"])
    file.write_bytes(file.read_bytes()[:-100])
    recipe = make_recipe("data.max_bad_rows=1", sources=[source])
    for _ in range(2):  # nor is what was prepared before the damage found to be complete
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz .*breaks after line"):
            run(recipe)


@pytest.mark.parametrize("packing", [True, False])
def test_long_rows_are_dropped_or_truncated_and_counted(
    make_recipe: MakeRecipe, run: Run, documents: Documents, text: Text, packing: bool
) -> None:
    source = text(*good(5), {"text": "long " * 100}, {"text": "longer " * 100})
    base = ("data.seq_len=32", f"data.packing={str(packing).lower()}", "data.max_bad_rows=0")
    dropped = run(make_recipe(*base, "data.long_rows=drop", sources=[source]))
    assert (dropped.counts.used, dropped.counts.truncated, dict(dropped.counts.rejected)) == (5, 0, {TOO_LONG: 2})
    assert "data.seq_len is 32" in rejects(dropped)[0]["detail"]
    cut = run(make_recipe(*base, "data.long_rows=truncate", sources=[source]))
    assert (cut.counts.used, cut.counts.truncated, cut.counts.rejected.total()) == (7, 2, 0)
    if not packing:
        assert (dropped.rows, cut.rows) == (5, 7)
    (long,) = documents(cut)[f"{source['path']}:6"]
    assert long and ("long " * 100).startswith(long)
    assert dropped.counts.lengths == cut.counts.lengths  # of the rows as they came


def test_a_row_of_exactly_seq_len_tokens_is_not_long(
    make_recipe: MakeRecipe, run: Run, text: Text, demo: DemoPaths
) -> None:
    row = {"text": "one two three four five six seven eight"}
    length = len(load_tokenizer(demo.base)(row["text"], add_special_tokens=False).input_ids) + 2
    for seq_len, used in ((length, 1), (length - 1, 0)):
        recipe = make_recipe(f"data.seq_len={seq_len}", sources=[text(row, {"text": "a"})])
        assert run(recipe).counts.used == 1 + used


def test_a_row_cut_before_its_answer_is_rejected_not_trained_on_nothing(
    make_recipe: MakeRecipe, run: Run, tmp_path: Path
) -> None:
    rows = [{"prompt": "one " * 100, "completion": "two"}, *[{"prompt": "a", "completion": "b"}] * 9]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "prompt_completion", "path": str(tmp_path / "data.jsonl")}
    overrides = ("data.seq_len=32", "data.long_rows=truncate", "data.max_bad_rows=0.1")
    prepared = run(make_recipe(*overrides, sources=[source]))
    assert (prepared.counts.used, prepared.counts.truncated) == (9, 0)
    assert rejects(prepared)[0]["reason"] == "nothing to train on" and rejects(prepared)[0]["line"] == 1


# --------------------------------------------------------------------------------------------------------- refusal


def test_too_many_bad_rows_stop_with_the_three_commonest_reasons(make_recipe: MakeRecipe, run: Run, text: Text) -> None:
    bad = [*[b"{"] * 4, *[{"text": 1}] * 3, *[{}] * 2, b"null"]
    source = text(*good(90), *bad)
    with pytest.raises(DataError) as caught:
        run(make_recipe("data.max_bad_rows=0.099", sources=[source]))
    message = str(caught.value)
    assert "10.0% of 100 rows are bad, more than data.max_bad_rows = 9.9%" in message
    assert (
        "4 × invalid JSON; 3 × field 'text' is int, not a string; 2 × missing field 'text'" in message
        and "not a JSON object" not in message
    )
    assert "rejects.jsonl" in message
    assert run(make_recipe("data.max_bad_rows=0.1", sources=[source])).counts.used == 90


def test_the_share_that_is_suggested_is_enough(make_recipe: MakeRecipe, run: Run, text: Text) -> None:
    source = text(*good(41), b"{")
    with pytest.raises(DataError) as caught:
        run(make_recipe(sources=[source]))
    suggested = caught.value.ways_out[-1].rpartition(": ")[2]
    assert suggested.startswith("data.max_bad_rows=0.0")
    assert run(make_recipe(suggested, sources=[source])).counts.used == 41


def test_a_row_too_long_is_no_bad_row(make_recipe: MakeRecipe, run: Run, text: Text) -> None:
    source = text(*good(1), *[{"text": "word " * 300}] * 9)
    assert run(make_recipe("data.max_bad_rows=0", sources=[source])).counts.bad_share == 0


@pytest.mark.parametrize("bad", [{"text": 1}, {"text": "word " * 300}])
def test_data_with_every_row_rejected_is_refused_with_the_reason(
    make_recipe: MakeRecipe, run: Run, text: Text, bad: Any
) -> None:
    with pytest.raises(DataError, match="all 7 rows were rejected: 7 × ") as caught:
        run(make_recipe("data.max_bad_rows=1", sources=[text(*[bad] * 7)]))
    assert "rejects.jsonl" in str(caught.value)


@pytest.mark.parametrize("lines", [(), (b"", b" ")])
def test_empty_data_is_refused(make_recipe: MakeRecipe, run: Run, text: Text, lines: tuple[bytes, ...]) -> None:
    with pytest.raises(DataError, match=r"data\.train is empty"):
        run(make_recipe(sources=[text(*lines)]))


def test_files_without_a_byte_give_no_work_to_spread(make_recipe: MakeRecipe, text: Text, demo: DemoPaths) -> None:
    """Ray Data has no dataset of zero items."""
    recipe = make_recipe(sources=[text()])
    empty = prepare(recipe, "train", demo.base, lambda function, items: 1 / len(items))  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match=r"data\.train is empty"):
        check(empty, recipe, "train", empty.rejects)


def test_a_column_that_parquet_lacks_is_refused_before_any_work(
    make_recipe: MakeRecipe, run: Run, demo: DemoPaths, tmp_path: Path
) -> None:
    source = {"format": "prompt_completion", "path": demo.heldout, "prompt_field": "source_text"}
    with pytest.raises(DataError, match=r"lacks column 'completion'; it has .*'target_text'") as caught:
        run(make_recipe(sources=[source]))
    assert demo.heldout in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_without_a_chat_template_takes_plain_text_only(
    make_recipe: MakeRecipe, run: Run, text: Text, demo: DemoPaths, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    tokenizer = type(load_tokenizer(demo.base)).from_pretrained(demo.base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="'translation' needs a chat template"):
        run(make_recipe(), folder=str(folder))
    assert run(make_recipe(sources=[text(*good(3))]), folder=str(folder)).counts.used == 3


def test_a_file_that_fails_midway_leaves_nothing_that_counts_as_prepared(
    make_recipe: MakeRecipe, run: Run, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(sources=[text(*good(20))])
    with monkeypatch.context() as patch:
        patch.setattr(works, "pack", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(recipe)
    assert not [path for path in Path(recipe.run.storage).rglob("*") if path.is_file()]
    assert not run(recipe).reused


# ------------------------------------------------------------------------------------------------------------ keys


def test_two_preparations_are_equal_byte_for_byte(
    make_recipe: MakeRecipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(works, "SEGMENT_TOKENS", 2000)
    one = run(make_recipe())
    two = run(make_recipe(f"run.storage={tmp_path / 'elsewhere'}"))
    assert not one.reused and not two.reused and one.location != two.location
    assert len(one.units) > 10 and shards(one) == shards(two)


def test_chunks_may_be_done_in_any_order(
    make_recipe: MakeRecipe,
    run: Run,
    demo: DemoPaths,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def backwards(function: Callable[[Any], Any], items: Any) -> list[Any]:
        return [function(item) for item in reversed(items)][::-1]

    monkeypatch.setattr(sources, "CHUNK_BYTES", 4000)
    one = run(make_recipe())
    two = prepare(make_recipe(f"run.storage={tmp_path / 'elsewhere'}"), "train", demo.base, backwards)
    assert len(one.units) > 3 and shards(one) == shards(two)


def test_what_is_prepared_is_reused_by_every_run_that_agrees_on_it(make_recipe: MakeRecipe, run: Run) -> None:
    first = run(make_recipe())
    again = run(make_recipe("run.name=other", "run.seed=7", "data.shuffle=false", "train.optimizer.lr=1"))
    assert (first.reused, again.reused) == (False, True)
    assert again.location == first.location and again.counts == first.counts
    assert (again.units, again.origins) == (first.units, first.origins)


@pytest.mark.parametrize("override", ["data.seq_len=96", "data.packing=false", "data.long_rows=truncate"])
def test_another_layout_is_another_key(make_recipe: MakeRecipe, run: Run, override: str) -> None:
    assert run(make_recipe(override)).location != run(make_recipe()).location


def test_another_file_is_another_key(make_recipe: MakeRecipe, run: Run, text: Text) -> None:
    before = run(make_recipe(sources=[text(*good(5))]))
    after = run(make_recipe(sources=[text(*good(6))]))
    assert after.location != before.location and not after.reused and after.counts.used == 6


def test_a_tokenizer_that_was_looked_at_is_not_loaded_again_until_a_file_of_it_changes(
    make_recipe: MakeRecipe, run: Run, monkeypatch: pytest.MonkeyPatch, demo: DemoPaths, tmp_path: Path
) -> None:
    base = shutil.copytree(demo.base, tmp_path / "base")
    os.symlink("nowhere", base / "dangling_tokens.json")
    template = base / "chat_template.jinja"
    loaded: list[str] = []
    edits: list[str] = []

    def load(folder: str) -> Any:
        tokenizer = load_tokenizer(folder)
        loaded.append(folder)
        if edits:  # while it is loaded, or while rows are prepared
            template.write_text(edits.pop())
        return tokenizer

    for caller in (module, works):
        monkeypatch.setattr(caller, "load_tokenizer", load)
    first = run(make_recipe(), folder=str(base))
    assert loaded
    loaded.clear()
    again = run(make_recipe(), folder=str(base))
    assert again.reused and again.location == first.location and loaded == []
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "changes_no_token": 1}))
    edits.append(template.read_text().replace("model", "bot"))
    assert run(make_recipe(), folder=str(base)).location == first.location and loaded == [str(base)]
    # What was found of the old template must not be known of the new one.
    assert run(make_recipe(), folder=str(base)).location != first.location


def test_another_tokenizer_or_template_is_another_key_and_another_folder_is_not(
    make_recipe: MakeRecipe, run: Run, demo: DemoPaths, tmp_path: Path
) -> None:
    def edited(name: str, old: str, new: str) -> str:
        folder = shutil.copytree(demo.base, tmp_path / f"base-{len(list(tmp_path.iterdir()))}")
        file = folder / name
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new))
        return str(folder)

    original = run(make_recipe()).location
    assert run(make_recipe(), folder=edited("config.json", "{", "{")).location == original
    for name, old, new in (
        ("chat_template.jinja", "'\\n\\n'", "'\\n'"),
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
    ):
        assert run(make_recipe(), folder=edited(name, old, new)).location != original


def test_a_model_of_the_hub_is_resolved_where_the_work_is_done_once_per_process(
    make_recipe: MakeRecipe, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def model_folder(location: str, *, weights: bool = True, code: bool = False) -> str:
        asked.append((location, weights))
        return demo.base

    monkeypatch.setattr(sources, "CHUNK_BYTES", 8000)
    monkeypatch.setattr(hub, "model_folder", model_folder)
    prepared = prepare(make_recipe("model.path=somebody/some-model"), "train", demo.base, in_process)
    assert len(prepared.origins) > 3 and asked == [("somebody/some-model", False)]


def test_progress_is_told_chunk_by_chunk(
    make_recipe: MakeRecipe, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 8000)
    told: list[tuple[int, int]] = []
    prepare(make_recipe(), "train", demo.base, in_process, lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert total > 3 and told == [(done, total) for done in range(1, total + 1)]


def test_shards_appear_under_their_name_only_when_complete(make_recipe: MakeRecipe, run: Run) -> None:
    prepared = run(make_recipe())
    assert paths.list_dir(prepared.location) == ["rejects.jsonl", "shards", "stats.json"]
    assert {unit.shard for unit in prepared.units} == set(paths.list_dir(paths.join(prepared.location, "shards")))
