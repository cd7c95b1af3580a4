"""The benchmark of packing: its bound holds, its rows are those of the real preparation, and its check finds leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from benchmarks import packing
from benchmarks.isolation import documents_of, ours, seeing
from benchmarks.lengths import DISTRIBUTIONS, SHORTEST, drawn, fewest
from ray_ft.data import pack
from ray_ft.data.render import Tokens
from ray_ft.demo import DemoPaths

# ------------------------------------------------------------------------------------------------------------ bounds


@given(st.lists(st.integers(1, 20), max_size=40))
def test_no_packing_has_fewer_rows_than_the_bound(lengths: list[int]) -> None:
    bound = fewest(np.array(lengths, np.int64), 20)
    assert -(-sum(lengths) // 20) <= bound <= len(pack.plan(lengths, 20))


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([6, 6, 6], 3), ([5, 5, 5, 5], 2), ([10], 1), ([6, 6, 4, 4, 4], 3), ([7, 7, 4, 4], 3), ([], 0)],
)
def test_the_bound_is_reached_where_it_is_known(lengths: list[int], rows: int) -> None:
    assert fewest(np.array(lengths, np.int64), 10) == rows


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_lengths_fit_and_are_the_same_each_time(name: str) -> None:
    lengths = drawn(name, 256, seed=3, samples=500, tokens=20_000)
    assert lengths.dtype == np.int64 and lengths.min() >= SHORTEST and lengths.max() <= 256
    assert 0 < len(lengths) <= 500 and lengths.sum() <= 20_000
    assert np.array_equal(lengths, drawn(name, 256, seed=3, samples=500, tokens=20_000))
    if not DISTRIBUTIONS[name].realistic:
        assert fewest(lengths, 256) == len(lengths)


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    packing.write_tokenizer(folder := str(tmp_path_factory.mktemp("words") / "tokenizer"))
    return folder


def test_rows_are_those_of_the_real_preparation(tokenizer: str, tmp_path: Path) -> None:
    lengths = drawn("chat", 256, seed=0, samples=60)
    assert packing.prepared(lengths, 256, str(tmp_path), tokenizer) == (
        len(pack.plan(lengths.tolist(), 256)),
        int(lengths.sum()),
    )


def test_a_sample_that_went_missing_is_said(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not 2 with"):
        packing.prepared(np.array([10, 33]), 32, str(tmp_path), tokenizer)  # the second does not fit


def test_samples_in_memory_are_packed_segment_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Tokens(np.zeros(n, np.int32), np.ones(n, bool)) for n in (6, 6, 4, 4)]
    assert packing.in_segments(samples, 10) == 2
    monkeypatch.setattr(packing, "SEGMENT_TOKENS", 12)
    assert packing.in_segments(samples, 10) == 3  # both of 6 by themselves, then both of 4


def test_figures_compare_shares_and_show_the_worst() -> None:
    def cell(name: str, ours: float, theirs: float) -> dict[str, Any]:
        share = {packing.OURS: ours, packing.THEIRS: theirs, packing.AT_ONCE: ours, "bound": 1.0}
        return {"name": name, "seq_len": 256, "samples": 5, "share": share}

    cells = [cell("chat", 0.99, 0.9), cell("labels", 0.95, 1.0), cell("over half", 0.7, 0.7)]
    seen = {"ray-ft, sdpa": (1, 9), "TRL, sdpa": (2, 9), "control": (8, 9)}
    found = packing.figures(cells, [{packing.OURS: 1.0, packing.THEIRS: 4.0}], seen)
    by_start = {one.name.split(",")[0]: one for one in found}
    assert by_start["share that is no padding"].values == [pytest.approx(0.97)]
    assert by_start["share that is no padding"].reached is False
    assert by_start["the least of these"].values == [0.95] and by_start["the least of these"].reached is False
    assert by_start["seconds to pack"].values == [0.25]
    leaks = [one for one in found if one.name.startswith("documents")]
    assert [(one.values, one.reached) for one in leaks] == [([1], False), ([2], None)]


# --------------------------------------------------------------------------------------------------------- isolation


def test_a_leak_is_found_and_none_is_invented() -> None:
    ids, spans = torch.arange(10), [slice(0, 4), slice(4, 7), slice(7, 10)]
    alone = lambda ids: torch.nn.functional.one_hot(ids % 50, 50).float()  # noqa: E731
    assert seeing(alone, ids, spans) == 0
    assert seeing(lambda ids: alone(ids).cumsum(0), ids, spans) == 2  # each sees those before it; the first none
    # As little as one bit.
    assert seeing(lambda ids: alone(ids) + 1 + ids[0].float() * 2**-23, ids, spans) == 2
    with pytest.raises(ValueError, match="two passes"):
        seeing(lambda ids: torch.rand(10, 50), ids, spans)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other_but_would_without_their_starts(demo: DemoPaths, attention: str) -> None:
    rng = np.random.default_rng(0)
    samples = [Tokens(rng.integers(6, 300, n, dtype=np.int32), np.ones(n, bool)) for n in (20, 30, 9, 40, 25)]
    rows, _ = pack.pack(samples, 64, packing=True, pad_id=0)
    model = AutoModelForCausalLM.from_pretrained(demo.base, dtype=torch.float32, attn_implementation=attention).eval()
    ids, spans = documents_of(rows)
    assert len(spans) == len(samples)
    with torch.no_grad():
        assert seeing(ours(model, rows), ids, spans) == 0
        rows.flags[:, 1:] &= ~np.uint8(pack.START)
        assert seeing(ours(model, rows), ids, spans) > 0
