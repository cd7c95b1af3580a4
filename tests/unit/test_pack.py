"""Packed samples are whole, each stands once, and none of them sees another."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, PreTrainedModel

from ray_ft.data.pack import REAL, START, TRAINED, Rows, labels, pack, plan, position_ids
from ray_ft.data.render import Tokens
from ray_ft.demo import DemoPaths

PAD = 0
SEQ_LEN = 16
#: Lengths of samples; all of them fit.
LENGTHS = st.lists(st.integers(1, SEQ_LEN), max_size=40)


def samples(lengths: list[int], seed: int = 0, vocabulary: int = 500) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [Tokens(rng.integers(6, vocabulary, n, dtype=np.int32), rng.random(n) < 0.5) for n in lengths]


def documents(rows: Rows) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """What a reader of the flags finds: (ids, trained) of each document that is not padding."""
    found = []
    for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
        edges = [*np.flatnonzero(flags & START).tolist(), len(ids)]
        for start, stop in itertools.pairwise(edges):
            real = (flags[start:stop] & REAL) > 0
            assert real.all() or not real.any()
            if real.all():
                trained = (flags[start:stop] & TRAINED) > 0
                found.append((tuple(ids[start:stop].tolist()), tuple(trained.tolist())))
    return found


def as_document(sample: Tokens) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return tuple(sample.ids.tolist()), tuple(sample.trained.tolist())


# ------------------------------------------------------------------------------------------------------------ rows


@given(lengths=LENGTHS, packing=st.booleans())
def test_every_sample_stands_once_and_whole_in_rows_of_one_length(lengths: list[int], packing: bool) -> None:
    given_samples = samples(lengths)
    rows, members = pack(given_samples, SEQ_LEN, packing=packing, pad_id=PAD)
    assert rows.input_ids.shape == rows.flags.shape == (len(members), SEQ_LEN)
    assert rows.input_ids.dtype == np.int32 and rows.flags.dtype == np.uint8
    assert sorted(index for row in members for index in row) == list(range(len(lengths)))
    expected = [as_document(given_samples[index]) for row in members for index in row]
    assert documents(rows) == expected
    assert (rows.input_ids[(rows.flags & REAL) == 0] == PAD).all()
    assert not (rows.flags[(rows.flags & REAL) == 0] & TRAINED).any()


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_rows_are_as_few_as_best_fit_promises(lengths: list[int]) -> None:
    rows = plan(lengths, 50)
    assert all(0 < sum(lengths[i] for i in row) <= 50 for row in rows)
    free = [50 - sum(lengths[i] for i in row) for row in rows]
    # The tightest row that fits was taken: no row could be poured into the free tokens of an earlier one.
    for at, row in enumerate(rows):
        assert all(lengths[row[0]] > free[before] for before in range(at))
    fewest = -(-sum(lengths) // 50)
    assert len(rows) <= max(2 * fewest - 1, 0)  # no two rows are half empty


def test_a_sample_goes_into_the_fullest_row_that_takes_it() -> None:
    assert plan([6, 8, 4, 2], 10) == [[1, 3], [0, 2]]
    assert plan([5, 7, 3], 10) == [[1, 2], [0]]


def test_packing_real_lengths_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 2000).tolist()
    rows = plan(lengths, 1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.99


def test_packing_is_the_same_each_time() -> None:
    lengths = np.random.default_rng(1).integers(1, 17, 200).tolist()
    assert plan(lengths, SEQ_LEN) == plan(list(lengths), SEQ_LEN)
    assert plan([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]  # equals in their given order


def test_without_packing_each_sample_has_its_row_in_the_given_order() -> None:
    given_samples = samples([3, SEQ_LEN, 1])
    rows, members = pack(given_samples, SEQ_LEN, packing=False, pad_id=9)
    assert members == [[0], [1], [2]]
    for row, sample in zip(rows.input_ids.tolist(), given_samples, strict=True):
        assert row == sample.ids.tolist() + [9] * (SEQ_LEN - len(sample))


@given(lengths=LENGTHS.filter(bool))
def test_positions_restart_at_each_document_and_at_the_padding(lengths: list[int]) -> None:
    rows, members = pack(samples(lengths), SEQ_LEN, packing=True, pad_id=PAD)
    for found, row in zip(position_ids(rows.flags).tolist(), members, strict=True):
        used = [lengths[index] for index in row]
        expected = [at for n in [*used, SEQ_LEN - sum(used)] for at in range(n)]
        assert found == expected


def test_labels_are_the_trained_tokens_and_minus_100_elsewhere() -> None:
    sample = Tokens(np.array([7, 8, 9], np.int32), np.array([False, True, True]))
    rows, _ = pack([sample, sample], 8, packing=True, pad_id=PAD)
    assert labels(rows.input_ids, rows.flags).tolist() == [[-100, 8, 9, -100, 8, 9, -100, -100]]
    assert labels(rows.input_ids, rows.flags).dtype == np.int64


def test_blank_rows_have_nothing_to_train_on() -> None:
    blank = Rows.blank(2, SEQ_LEN)
    assert len(blank) == 2 and documents(blank) == []
    assert (labels(blank.input_ids, blank.flags) == -100).all()
    assert position_ids(blank.flags).tolist() == [list(range(SEQ_LEN))] * 2


def test_rows_can_be_taken_and_joined() -> None:
    rows, _ = pack(samples([SEQ_LEN] * 5), SEQ_LEN, packing=True, pad_id=PAD)
    again = Rows.concatenate([rows.take(slice(0, 2)), rows.take(np.array([2, 3, 4]))])
    np.testing.assert_array_equal(again.input_ids, rows.input_ids)
    np.testing.assert_array_equal(again.flags, rows.flags)


# -------------------------------------------------------------------------------------- documents and each other


@pytest.fixture(scope="module")
def model(demo: DemoPaths) -> PreTrainedModel:
    model = Gemma3ForCausalLM.from_pretrained(demo.base, attn_implementation="sdpa").eval()
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    return model


@pytest.fixture(scope="module")
def packed(model: PreTrainedModel) -> tuple[list[Tokens], Rows, list[list[int]]]:
    """Three rows of 128 tokens: documents longer than the sliding window, shorter ones, and padding."""
    given_samples = samples([70, 50, 40, 39, 30, 20, 9, 60, 3], vocabulary=model.config.vocab_size)
    rows, members = pack(given_samples, 128, packing=True, pad_id=PAD)
    assert len(rows) == 3 and max(map(len, members)) >= 3 and max(map(len, given_samples)) > model.config.sliding_window
    assert any(not flags[-1] & REAL for flags in rows.flags)
    return given_samples, rows, members


def logits(model: PreTrainedModel, ids: np.ndarray, positions: np.ndarray | None = None) -> Any:
    """As the training loop calls the model: position ids that restart, and no attention mask."""
    with torch.no_grad():
        inputs = torch.from_numpy(ids.astype(np.int64))
        where = None if positions is None else torch.from_numpy(positions)
        return model(input_ids=inputs, position_ids=where, use_cache=False).logits.float()


def largest_difference(
    model: PreTrainedModel, packed: tuple[list[Tokens], Rows, list[list[int]]], positions: np.ndarray
) -> float:
    """Between the logits of samples in packed rows and of each sample alone."""
    given_samples, rows, members = packed
    together = logits(model, rows.input_ids, positions)
    differences = Counter[int]()
    for row, indices in enumerate(members):
        at = 0
        for index in indices:
            sample = given_samples[index]
            alone = logits(model, sample.ids[None])[0]
            differences[index] = float((together[row, at : at + len(sample)] - alone).abs().max())
            at += len(sample)
    assert len(differences) == len(given_samples)
    return max(differences.values())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_document_sees_another(model: PreTrainedModel, packed: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    try:
        assert largest_difference(model, packed, position_ids(packed[1].flags)) <= 1e-5
    finally:
        model.set_attn_implementation("sdpa")


def test_positions_that_do_not_restart_would_be_seen(model: PreTrainedModel, packed: Any) -> None:
    """The planted fault: the comparison above notices when documents are not kept apart."""
    running = np.broadcast_to(np.arange(128), packed[1].flags.shape).copy()
    assert largest_difference(model, packed, running) > 1e-2


def test_one_missing_document_start_would_be_seen(model: PreTrainedModel, packed: Any) -> None:
    flags = packed[1].flags.copy()
    first = np.flatnonzero(flags[0] & START)[1]
    flags[0, first] &= ~np.uint8(START)
    assert largest_difference(model, packed, position_ids(flags)) > 1e-2
