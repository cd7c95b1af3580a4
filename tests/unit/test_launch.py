"""Whole runs through `launch.train` in this process: what they leave behind, repeating, continuing, stopping."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of
from rich.console import Console

from ray_ft import artifacts, paths, recipe
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError, ResourceError, StorageError, TrainingError
from ray_ft.train import checkpoint, cluster, launch, loop
from ray_ft.train.metrics import MetricsLog, read_metrics
from ray_ft.view import View

Record = tuple[View, io.StringIO]


@pytest.fixture
def shown() -> Record:
    out = io.StringIO()
    return View(Console(file=out, soft_wrap=True)), out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_for(demo: DemoPaths, storage: Path, *overrides: str) -> recipe.Recipe:
    few = [f"data.train.0.path={demo.train[0]}", "train.micro_batch=8", "train.global_batch=16"]
    return recipe_of(demo, storage, *few, *overrides)


def test_a_whole_run_then_nothing_more_then_another_epoch(demo: DemoPaths, tmp_path: Path, shown: Record) -> None:
    view, out = shown
    settings = recipe_for(demo, tmp_path, "train.checkpoint.every=2", "train.eval_every=3")
    run = settings.run.dir
    first = launch.train(settings, view)
    assert first.complete
    assert 0 < (first.first_step_seconds or 0) < first.seconds
    assert recipe.load(run.recipe) == settings
    stats = paths.read_json(run.stats)
    assert stats["train"]["rows"] == stats["train"]["used"] == 200
    total = -(-stats["train"]["packed"] // 16)
    assert first.finished == first.total == total
    assert paths.exists(run.rejects)
    assert any("tfevents" in name for name in paths.list_dir(run.tensorboard))
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "eval_loss" in row] == sorted({*range(3, total + 1, 3), total})
    assert checkpoint.steps(run.checkpoints)[-1] == total
    assert len(out.getvalue().splitlines()) < 20

    before = {file: file.stat().st_mtime_ns for file in Path(run.checkpoints).rglob("*")}
    again = launch.train(settings, view)
    assert (again.finished, again.total, again.first_step_seconds) == (total, total, None)
    assert f"run is already trained: {total} of {total} steps" in out.getvalue()
    assert read_metrics(run) == rows
    assert {file: file.stat().st_mtime_ns for file in Path(run.checkpoints).rglob("*")} == before

    more = launch.train(recipe_for(demo, tmp_path, "train.epochs=2", "train.log_every=2"), view)
    assert (more.finished, more.total) == (-(-2 * stats["train"]["packed"] // 16),) * 2
    assert f"resuming run at step {total} of {more.total}" in out.getvalue()
    steps = [row["step"] for row in read_metrics(run)]
    assert steps[:total] == list(range(1, total + 1))
    assert steps == sorted(set(steps)) and steps[-1] == more.total
    assert recipe.load(run.recipe).train.epochs == 2


def at_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action` while step `step` (from 1) is being computed."""
    real, taken = loop.train_step, []

    def train_step(*args: Any, **keywords: Any) -> Any:
        taken.append(1)
        if len(taken) == step:
            action()
        return real(*args, **keywords)

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("told_by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_checkpoint_and_the_next_call_ends_as_if_undisturbed(
    demo: DemoPaths, tmp_path: Path, shown: Record, monkeypatch: pytest.MonkeyPatch, told_by: signal.Signals
) -> None:
    view, _out = shown
    options = ["train.max_steps=8", "train.eval_every=8"]
    whole = recipe_for(demo, tmp_path, "run.name=whole", *options)
    assert launch.train(whole, view).complete

    settings = recipe_for(demo, tmp_path, "run.name=stopped", *options)
    told = threading.Event()
    real_line = view.line

    def line(text: str) -> None:
        real_line(text)
        if text.startswith("stopping after this step"):
            told.set()

    monkeypatch.setattr(view, "line", line)

    def interrupt() -> None:
        os.kill(os.getpid(), told_by)
        assert told.wait(60)

    with monkeypatch.context() as patch:
        at_step(3, interrupt, patch)
        stopped = launch.train(settings, view)
    assert not stopped.complete and stopped.signal == told_by
    assert stopped.finished in (3, 4)  # the wish is asked for before a step
    assert checkpoint.steps(settings.run.dir.checkpoints) == [stopped.finished]
    assert not [t for t in threading.enumerate() if t.name == "ray-ft-train" and t.is_alive()]

    ended = launch.train(settings, view)
    assert ended.complete
    expected, found = (read_metrics(r.run.dir) for r in (whole, settings))
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    assert found[-1]["eval_loss"] == expected[-1]["eval_loss"]


def test_without_workers_any_strategy_trains_unsharded(demo: DemoPaths, tmp_path: Path, shown: Record) -> None:
    losses = []
    for strategy in ("fsdp", "none"):
        settings = recipe_for(demo, tmp_path / strategy, f"train.strategy={strategy}", "train.max_steps=2")
        assert launch.train(settings, shown[0]).taken == 2
        losses.append([row["loss"] for row in read_metrics(settings.run.dir)])
    assert losses[0] == losses[1]


def test_a_worker_that_fails_is_told_of_and_the_run_goes_on_from_its_checkpoint(
    demo: DemoPaths, tmp_path: Path, shown: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, _ = shown
    settings = recipe_for(demo, tmp_path, "train.max_steps=4", "train.checkpoint.every=2")

    def fail() -> None:
        raise RuntimeError("the disk is on fire")

    with monkeypatch.context() as patch:
        at_step(4, fail, patch)
        with pytest.raises(RuntimeError, match="the disk is on fire"):  # as it is, with its traceback
            launch.train(settings, view)
    assert [row["step"] for row in read_metrics(settings.run.dir)] == [1, 2, 3]
    assert launch.train(settings, view).complete
    assert [row["step"] for row in read_metrics(settings.run.dir)] == [1, 2, 3, 4]


def test_what_cannot_run_in_process_is_refused(demo: DemoPaths, tmp_path: Path, shown: Record) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"train\.device = 'cuda'"):
            launch.train(recipe_for(demo, tmp_path, "train.device=cuda"), shown[0])


def test_storage_that_cannot_be_written_is_refused_before_anything_else(
    demo: DemoPaths, tmp_path: Path, shown: Record
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"not writable") as caught:
        launch.train(recipe_for(demo, tmp_path / "file"), shown[0])
    assert "run.storage" in str(caught.value)


def test_a_refused_change_leaves_the_runs_own_recipe(demo: DemoPaths, tmp_path: Path, shown: Record) -> None:
    view, _ = shown
    settings = recipe_for(demo, tmp_path, "train.max_steps=1")
    launch.train(settings, view)
    with pytest.raises(CheckpointError, match=r"train\.global_batch"):
        launch.train(recipe_for(demo, tmp_path, "train.max_steps=2", "train.global_batch=8"), view)
    assert recipe.load(settings.run.dir.recipe) == settings
    MetricsLog(settings.run.dir, 1).close()
    assert [row["step"] for row in read_metrics(settings.run.dir)] == [1]


def test_the_deliberate_error_is_found_inside_what_wraps_it() -> None:
    class Wrapped(Exception):
        def __init__(self, cause: BaseException) -> None:
            self.cause = cause

    class Group(Exception):
        worker_failures: dict[int, BaseException]

    ours, group = CheckpointError("ours"), Group("2 workers failed")
    group.worker_failures = {0: RuntimeError("a peer closed the connection"), 1: Wrapped(ours)}
    run = artifacts.RunDir("/run")
    assert cluster._as_ours(group, run) is ours
    other = cluster._as_ours(RuntimeError("line 1\nline 2"), run)
    assert isinstance(other, TrainingError)
    assert "line 1\n    line 2" in str(other) and "/run/logs" in str(other)


def test_the_rejects_of_all_splits_are_in_the_run(demo: DemoPaths, tmp_path: Path, shown: Record) -> None:
    settings = recipe_for(demo, tmp_path, "train.max_steps=1", "data.seq_len=32")  # some samples are longer
    job = launch.prepare_job(settings, shown[0], in_process)
    expected = [paths.read_text(split.rejects) for split in job.splits.values()]
    assert all(expected)
    assert paths.read_text(settings.run.dir.rejects) == "".join(expected)
