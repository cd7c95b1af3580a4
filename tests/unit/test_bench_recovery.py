"""The benchmark of recovery: how its figures are computed, and that the peer goes on at its checkpoint."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import recovery
from benchmarks.peers.torchrun_restarts import Torchrun
from ray_ft.demo import DemoPaths


def test_a_run_has_gone_back_where_a_step_follows_that_is_not_a_later_one() -> None:
    assert recovery.resumed([1, 2, 3]) is None
    assert recovery.resumed([1, 2, 3, 3]) == 3
    assert recovery.resumed([1, 2, 3, 2, 3]) == 3
    assert recovery.resumed([]) is None


def test_the_parts_of_a_recovery_add_up_to_it() -> None:
    found = recovery.parts({"noticed": 1.0, "started": 4.0, "begins": 12.0}, model=5.0, recovery=12.5)
    assert tuple(found) == recovery.PARTS
    assert list(found.values()) == pytest.approx([1.0, 3.0, 3.0, 5.0, 0.5])
    assert sum(found.values()) == pytest.approx(12.5)


def pair(ours: float, theirs: float) -> dict[str, Any]:
    parts = recovery.parts({"noticed": 0.1 * ours, "started": 0.2 * ours, "begins": 0.9 * ours}, 0.5 * ours, ours)
    return {
        "ray-ft": {"cold": 20.0, "recovery": ours, "again": 5, **parts},
        "torchrun": {"cold": 8.0, "recovery": theirs, "again": 6},
    }


def test_figures_compare_with_the_start_and_with_the_peer() -> None:
    pairs = [pair(10.0, 8.0), pair(30.0, 10.0), pair(30.0, 10.0)]
    found = {figure.name: figure for figure in recovery.figures(pairs)}
    own = found["kill to the next finished step ÷ start of the same run, ray-ft"]
    assert list(own.values) == [0.5, 1.5, 1.5] and own.reached is False
    assert list(found["kill to the next finished step, ray-ft ÷ torchrun"].values) == [1.25, 3.0, 3.0]
    assert list(found["steps taken again, torchrun"].values) == [6, 6, 6]
    assert recovery.where(pairs).rows[0] == ["the death is noticed", "3.0", "1.0", "3.0"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [2, 1000])
def test_the_peer_goes_on_at_its_newest_checkpoint(demo: DemoPaths, tmp_path: Path, every: int) -> None:
    tokens = np.random.default_rng(0).integers(6, 60, (400, 16))
    positions = np.tile(np.arange(16), (400, 1))
    np.savez(tmp_path / "rows.npz", input_ids=tokens, position_ids=positions, labels=tokens)
    progress, settings = tmp_path / "progress", tmp_path / "settings.json"
    content = {
        "rows": str(tmp_path / "rows.npz"),
        "model": demo.base,
        "threads": 1,
        "global_batch": 2,
        "steps": 200,
        "lr": 1e-3,
        "checkpoint": {"folder": str(tmp_path / "checkpoints"), "every": every},
        "progress": str(progress),
        "result": str(tmp_path / "result.json"),
    }
    settings.write_text(json.dumps(content))
    run = Torchrun(settings, progress, 2)
    try:
        run.wait("step 5", lambda: len(run.steps()) >= 5, 280)
        os.kill(run.workers()[0], signal.SIGKILL)
        run.wait("step after the kill", lambda: recovery.resumed(run.steps()) is not None, 280)
        steps = run.steps()
    finally:
        run.end()
    at = recovery.resumed(steps)
    assert at is not None
    newest = steps[at - 1] // every * every  # the kill may fall into the writing of this one, which does not count then
    assert steps[at] - 1 in ({0} if every == 1000 else {newest, newest - every})
