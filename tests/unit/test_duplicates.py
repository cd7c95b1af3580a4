"""Rows that equal an earlier one are counted over all files and chunks of a split, and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ft.data import duplicates, sources
from ray_ft.data.prepare import prepare
from ray_ft.data.render import Tokens
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.recipe import Recipe


def tokens(ids: list[int], trained: list[bool]) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array(trained, bool))


def test_samples_that_are_trained_on_differently_differ() -> None:
    samples = [
        tokens([1, 2], [False, True]),
        tokens([1, 2], [True, True]),
        tokens([2, 1], [False, True]),
        tokens([1, 2, 0], [False, True, False]),
        tokens([1], [True]),
    ]
    hashes = [duplicates.row_hash(sample) for sample in samples]
    assert {len(found) for found in hashes} == {8} and len(set(hashes)) == len(samples)
    assert duplicates.row_hash(tokens([1, 2], [False, True])) == hashes[0]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6))
def test_the_count_is_of_rows_beyond_the_first_of_each(chunks: list[list[int]]) -> None:
    rows = [row for chunk in chunks for row in chunk]
    hashes = [b"".join(row.to_bytes(8, "little") for row in chunk) for chunk in chunks]
    assert duplicates.count(hashes) == len(rows) - len(set(rows))


def test_duplicates_are_counted_across_chunks_and_files_and_said(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    rows = [f"row {n % 30}" for n in range(50)]
    for name, part in (("a.jsonl", rows[:25]), ("b.jsonl", rows[25:])):
        (tmp_path / name).write_text("".join(json.dumps({"id": n, "text": row}) + "\n" for n, row in enumerate(part)))
    recipe = make_recipe(sources=[{"format": "text", "path": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]}])
    prepared = prepare(recipe, "train", demo.base, in_process)
    assert (prepared.counts.used, prepared.counts.duplicates) == (50, 20)
    assert "20 duplicate rows, used" in prepared.summary() and prepared.stats()["duplicates"] == 20
    again = prepare(recipe, "train", demo.base, in_process)
    assert again.reused and again.counts.duplicates == 20


def test_without_duplicates_nothing_is_said(make_recipe: Callable[..., Recipe], demo: DemoPaths) -> None:
    prepared = prepare(make_recipe(), "train", demo.base, in_process)
    assert prepared.counts.duplicates == 0 and "duplicate" not in prepared.summary()
