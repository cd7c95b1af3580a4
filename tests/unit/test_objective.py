"""Sums over rows: of losses, targets and statistics, together and by source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ray_ft.data.pack import TRAINED
from ray_ft.train.objective import TOKENS, Sums, of_labels

FLAGS = np.array([[0, TRAINED, TRAINED], [0, TRAINED, 0], [0, 0, 0]], np.uint8)  # the last row is padding
CPU = torch.device("cpu")


def test_means_are_over_targets_and_by_source() -> None:
    sums = Sums(TOKENS, (0, 2), CPU)
    sums.add(torch.tensor([[4.0], [3.0], [0.0]]), FLAGS, np.array([2, 0, -1]))
    means = sums.read(sums.values.tolist())
    assert (means.loss, means.targets, means.statistics) == (7 / 3, 3, {})
    assert means.by_source == {0: 3.0, 2: 2.0}
    assert dict(means.more("eval")) == {"eval_loss/data.eval.0": 3.0, "eval_loss/data.eval.2": 2.0}


def test_one_source_is_not_told_apart_and_statistics_are_means_too() -> None:
    objective = replace(TOKENS, statistics=("accuracy",))
    sums = Sums(objective, (1,), CPU)
    for row, counts in enumerate([2.0, 0.0, 0.0]):
        sums.add(torch.tensor([[float(row), counts]]), FLAGS[row : row + 1], None)
    means = sums.read(sums.values.tolist())
    assert dict(means.more("train")) == {"accuracy": pytest.approx(2 / 3)}
    assert means.by_source == {}


def test_macro_f1_is_of_the_labels_that_rows_have() -> None:
    """Four texts: a said rightly and as b, b rightly, b as c. Nothing is c, which therefore counts in no mean."""
    sums = Sums(of_labels(["a", "b", "c"]), (), CPU)
    counts = [0.0, *(1, 1, 0), *(2, 2, 0), *(1, 2, 1)]  # loss; right, wanted, said of each label
    sums.add(torch.tensor([counts]), np.full((1, 4), TRAINED, np.uint8), None)
    told = dict(sums.read(sums.values.tolist()).more("eval"))
    assert told == {"eval_accuracy": 0.5, "eval_macro_f1": pytest.approx((2 / 3 + 2 / 4) / 2)}


def test_a_source_without_a_target_has_no_loss() -> None:
    sums = Sums(TOKENS, (0, 1), CPU)
    sums.add(torch.tensor([[4.0]]), FLAGS[:1], np.array([1]))
    assert sums.read(sums.values.tolist()).by_source == {1: 2.0}
