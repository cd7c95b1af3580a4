"""Losers give their space back, and nothing goes that may still be the best, or that another trial goes on from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ft import paths
from ray_ft.span import Span
from ray_ft.train import checkpoint
from ray_ft.tune import prune
from ray_ft.tune.journal import Report, Status, Sweep, Trial


class Storage:
    """A sweep's directory, with checkpoints of which none holds more than a number."""

    def __init__(self, root: Path | str, mode: Any = "min") -> None:
        self.sweep = Sweep(str(root), "eval_loss", mode, "0" * 64, 0.0)
        self.said: list[str] = []

    def trial(self, status: Status, steps: list[int], value: float | None = None) -> Trial:
        """The next trial; its checkpoints are of `steps`, and it reported `value` at the last of them."""
        trial = Trial(len(self.sweep.trials), {}, status=status)
        for step in steps:
            checkpoint.save(self.folder(trial), step, {"model/x": Span.whole(torch.zeros(1))}, {}, 0, 1)
        if value is not None:
            trial.reports = [Report(max(steps, default=1), 100, value, 1.0)]
        self.sweep.save_trial(trial)
        return trial

    def folder(self, trial: Trial) -> str:
        return self.sweep.run_of(trial).checkpoints

    def steps(self, trial: Trial) -> list[int]:
        return checkpoint.steps(self.folder(trial))

    def location(self, trial: Trial, step: int) -> str:
        return paths.join(self.folder(trial), checkpoint.name(step))

    def losers(self, keep: int = 1, **changes: Any) -> list[int]:
        return [trial.number for trial in prune.losers(self.sweep, keep, self.said.append, **changes)]

    def superseded(self, keep: int = 1, needed: tuple[str, ...] = ()) -> None:
        prune.superseded(self.sweep, keep, needed, self.said.append)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "sweep")


# ------------------------------------------------------------------------------------------------------------- losers


def test_the_best_keep_theirs_and_losers_are_marked(storage: Storage) -> None:
    first, second, third = (storage.trial("finished", [50, 100], value) for value in (2.0, 1.0, 3.0))
    assert storage.losers(keep=2) == [2]
    assert (storage.steps(first), storage.steps(second), storage.steps(third)) == ([50, 100], [50, 100], [])
    assert not paths.exists(storage.folder(third))
    storage.sweep.save()
    read = Sweep.load(storage.sweep.root).trials
    assert [read[number].pruned for number in range(3)] == [False, False, True]
    assert storage.losers(keep=2) == []  # once
    assert storage.said == []


def test_more_is_better_where_the_recipe_says_so(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "max")
    low, high = (storage.trial("finished", [100], value) for value in (1.0, 2.0))
    assert storage.losers() == [low.number]
    assert storage.steps(high) == [100]


def test_a_stopped_trial_keeps_its_own_until_one_has_finished(storage: Storage) -> None:
    early, late = storage.trial("stopped", [10], 1.0), storage.trial("stopped", [40], 2.0)
    running = storage.trial("running", [60], 1.5)
    assert storage.losers() == [early.number]
    assert storage.steps(late) == [40]
    assert storage.sweep.best() is running
    running.status = "failed"  # the best that is left has its checkpoint
    assert storage.losers() == [running.number]
    assert storage.sweep.best() is late
    assert storage.steps(late) == [40]
    finished = storage.trial("finished", [100], 9.0)
    assert storage.losers() == [late.number]
    assert storage.steps(finished) == [100]


def test_a_failed_trial_keeps_only_what_it_wrote_about_itself(storage: Storage) -> None:
    failed = storage.trial("failed", [10], 0.1)
    log = storage.sweep.run_of(failed).at("logs", "trial.txt")
    paths.write_text(log, "why")
    never = storage.trial("failed", [])
    assert storage.losers(keep=5) == [failed.number, never.number]
    assert storage.steps(failed) == []
    assert paths.read_text(log) == "why"


@pytest.mark.parametrize("status", ["waiting", "running", "paused"])
def test_a_trial_that_goes_on_loses_nothing(storage: Storage, status: Status) -> None:
    storage.trial("finished", [100], 1.0)
    trial = storage.trial(status, [10], 9.0)
    assert storage.losers() == []
    assert storage.steps(trial) == [10]


def test_a_loser_waits_while_another_trial_goes_on_from_it(storage: Storage) -> None:
    storage.trial("finished", [100], 1.0)
    parent = storage.trial("finished", [50, 100], 2.0)
    assert storage.losers(needed=[storage.location(parent, 50)]) == []
    assert storage.steps(parent) == [50, 100]
    assert not parent.pruned
    assert storage.losers() == [parent.number]


def test_a_loser_waits_while_its_own_process_may_still_save(storage: Storage) -> None:
    storage.trial("finished", [100], 1.0)
    loser = storage.trial("stopped", [50], 2.0)
    assert storage.losers(busy=[loser.number]) == []
    assert storage.steps(loser) == [50]
    assert storage.losers() == [loser.number]


def test_what_was_never_committed_and_what_was_broken_goes_too(storage: Storage) -> None:
    storage.trial("finished", [100], 1.0)
    loser = storage.trial("stopped", [10, 20], 2.0)
    paths.delete_file(paths.join(storage.location(loser, 20), checkpoint.COMMITTED))
    checkpoint.set_aside(storage.location(loser, 10), "broken")
    assert storage.losers() == [loser.number]
    assert not paths.exists(storage.folder(loser))


def test_what_storage_refuses_is_said_and_tried_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.trial("finished", [100], 1.0)
    stuck, other = storage.trial("stopped", [10], 2.0), storage.trial("stopped", [10], 3.0)

    def refuse(location: str) -> None:
        if location.startswith(storage.folder(stuck)):
            raise PermissionError(13, "not allowed")
        delete_dir(location)

    delete_dir = paths.delete_dir
    with monkeypatch.context() as patched:
        patched.setattr(paths, "delete_dir", refuse)
        assert storage.losers() == [other.number]  # a sweep does not stumble over one trial
    assert not stuck.pruned
    assert any("not allowed" in line for line in storage.said)
    assert storage.losers() == [stuck.number]


def test_a_marker_that_stays_leaves_its_checkpoint_whole(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.trial("finished", [100], 1.0)
    loser = storage.trial("stopped", [10], 2.0)

    def refuse(location: str) -> None:
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr(paths, "delete_file", refuse)
    assert storage.losers() == []
    checkpoint.verify(storage.location(loser, 10))
    assert len(storage.said) == 1


def test_a_folder_that_lies_elsewhere_is_left_there(storage: Storage, tmp_path: Path) -> None:
    storage.trial("finished", [100], 1.0)
    loser = storage.trial("stopped", [], 2.0)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", storage.folder(loser))
    assert storage.losers() == []
    assert (tmp_path / "elsewhere").is_dir()
    assert len(storage.said) == 1


STATUSES = st.sampled_from(["waiting", "running", "paused", "finished", "stopped", "failed"])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(STATUSES, st.integers(1, 99), st.none() | st.integers(0, 5)), max_size=6),
    st.integers(1, 3),
)
def test_the_best_of_those_that_are_over_keep_theirs(trials: list[tuple[Status, int, int | None]], keep: int) -> None:
    """Whatever ends in which order: as many as `keep`, and always the one that the sweep calls its best."""
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        for status, step, value in trials:
            at = 100 if status == "finished" else step
            storage.trial(status, [at], 1.0 if status == "finished" and value is None else value)
            storage.losers(keep)
        over = [trial for trial in storage.sweep.trials.values() if trial.over]
        could_win = [trial for trial in over if trial.reports and trial.status != "failed"]
        kept = [trial for trial in over if storage.steps(trial)]
        assert len(kept) == min(keep, len(could_win))
        assert all(trial.pruned != bool(storage.steps(trial)) for trial in over)
        best = storage.sweep.best()
        assert best is None or storage.steps(best)
        assert all(storage.steps(trial) for trial in storage.sweep.trials.values() if not trial.over)


# --------------------------------------------------------------------------------------------------------- superseded


def test_older_ones_go_and_needed_ones_stay(storage: Storage) -> None:
    trial = storage.trial("running", [10, 20, 30, 40], 1.0)
    storage.superseded(2, (storage.location(trial, 10),))
    assert storage.steps(trial) == [10, 30, 40]
    storage.superseded(2)
    assert storage.steps(trial) == [30, 40]
    assert storage.said == []


def test_what_a_trial_is_copying_may_be_older_than_its_own_and_stays(storage: Storage) -> None:
    trial = storage.trial("running", [10, 20, 30], 1.0)
    prune.superseded(storage.sweep, 1, (), storage.said.append, busy=[trial.number])
    assert storage.steps(trial) == [10, 20, 30]


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_trials_that_are_over_are_not_thinned(storage: Storage, status: Status) -> None:
    trial = storage.trial(status, [10, 20], 1.0)
    storage.superseded()
    assert storage.steps(trial) == [10, 20]


def test_a_broken_one_does_not_count_as_newer(storage: Storage) -> None:
    trial = storage.trial("running", [10, 20, 30], 1.0)
    paths.delete_file(paths.join(storage.location(trial, 30), checkpoint.STATE))
    storage.superseded()
    assert storage.steps(trial) == [20, 30]
    assert len(storage.said) == 1
    assert "state.json is missing" in storage.said[0]


def test_storage_that_does_not_answer_for_one_trial_costs_the_others_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = storage.trial("running", [10, 20]), storage.trial("running", [10, 20])

    def refuse(location: str) -> list[str]:
        if location == storage.folder(stuck):
            raise PermissionError(13, "not allowed")
        return list_dir(location)

    list_dir = paths.list_dir
    monkeypatch.setattr(paths, "list_dir", refuse)
    storage.superseded()
    monkeypatch.undo()
    assert (storage.steps(stuck), storage.steps(other)) == ([10, 20], [20])
    assert len(storage.said) == 1
    assert stuck.name in storage.said[0]
