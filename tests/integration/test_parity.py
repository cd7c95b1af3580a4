"""The parity benchmark runs, finds all ways of training equal, and notices where one is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import parity

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_strategies_adapters_and_restores_give_one_result(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.parity", "--quick", "--steps", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "parity.json").read_text())
    assert {row["strategy"] for row in found["parity"]} == {"fsdp", "zero3", "none"}
    assert {row["tuning"] for row in found["parity"]} == {"full", "lora"}
    assert len(found["restore"]) == 16
    assert all(row["ok"] for row in [*found["parity"], *found["restore"]])


def test_a_difference_of_one_tensor_or_one_step_is_seen() -> None:
    weights = {"large": torch.full((100, 100), 3.0), "small": torch.full((10,), 0.01)}
    expected = parity.Result([4.0, 2.0, 1.0], weights)
    assert parity.loss_difference(expected, expected) == 0
    assert parity.weight_difference(expected, expected) == (0.0, 0.0)
    later = parity.Result([4.0, 2.0, 1.0 + 2e-4], {**weights, "small": weights["small"] * 1.001})
    assert parity.loss_difference(later, expected) == pytest.approx(2e-4)
    whole, worst = parity.weight_difference(later, expected)
    assert worst == pytest.approx(1e-3, rel=1e-3)  # of one small tensor, which the whole hides
    assert whole < 1e-6
    with pytest.raises(SystemExit, match="other weights are trained"):
        parity.weight_difference(parity.Result([], {"large": weights["large"]}), expected)
