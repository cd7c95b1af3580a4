"""Saving behind the back of training: what is committed is what was there at `begin`, whoever dies or fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run

from ray_ft import paths, retry
from ray_ft.span import Span
from ray_ft.train import checkpoint, host_copy, saver, shards
from ray_ft.train.keeper import Keeper
from ray_ft.train.saver import Saver

SIZE = 4099  # elements; a prime, so that no cut is even


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(shards, "BLOCK", 4096)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(rank: int, world: int, value: float) -> dict[str, Span]:
    """A vector cut among the workers and a scalar that only the last one owns, both telling `value`."""
    whole = torch.arange(float(SIZE)) + value
    low, high = SIZE * rank // world, SIZE * (rank + 1) // world
    step = Span.whole(torch.tensor(float(value)), owner=rank == world - 1)
    return {"model/a": Span(whole[low:high].clone(), low, (SIZE,)), "optim/a/step": step}


def check(location: str, value: float) -> None:
    found = {"model/a": Span.whole(torch.zeros(SIZE)), "optim/a/step": Span.whole(torch.zeros(()))}
    checkpoint.restore(location, found)
    assert torch.equal(found["model/a"].data, torch.arange(float(SIZE)) + value)
    assert found["optim/a/step"].data.item() == value


def make(folder: Path | str, rank: int = 0, world: int = 1, **options: Any) -> tuple[Saver, list[str]]:
    lines: list[str] = []
    settings: dict[str, Any] = {"keep": 2, "details": {"world_size": world}, "background": True, **options}
    return Saver(
        str(folder), rank=rank, world=world, say=lines.append, ledger_folder=f"{folder}-ledger", **settings
    ), lines


def total(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def save(keeper: Saver, step: int, rank: int = 0, world: int = 1, ledger: bytes = b"") -> None:
    keeper.begin(step, state_of(rank, world, step), ledger)
    keeper.finish(total)


def names(folder: Path | str) -> list[str]:
    return sorted(os.listdir(folder))


# ------------------------------------------------------------------------------------------------ what is committed


def train(rank: int, world: int, folder: str, background: bool) -> list[Any]:
    """Steps of training with a save every third, as the loop makes them. Returns what was pending after each step."""
    shards.BLOCK = 4096
    torch.manual_seed(0)
    keeper, lines = make(folder, rank, world, background=background)
    seen, spans, recorded = [], state_of(rank, world, 0), b""
    for step in range(1, 13):
        for span in spans.values():
            span.data.add_(1)  # in place, also while a save is pending
        recorded += line(step, rank, world)
        keeper.advance(*total(torch.tensor(keeper.signals())).tolist())
        if step % 3 == 0 and keeper.pending is None:
            keeper.begin(step, spans, recorded)
            recorded = b""
            if not background:
                keeper.finish(total)
                assert keeper._host._buffer.numel() == 0  # no copy of the whole
        seen.append(keeper.pending)
    keeper.finish(total)
    assert keeper.failed_in_a_row == 0 and not lines, lines
    return [keeper.newest, seen]


def line(step: int, rank: int, world: int) -> bytes:
    first = (step - 1) * world + rank
    return json.dumps({"step": step, "first": first, "samples": [[f"a.jsonl:{first}"]]}).encode() + b"\n"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_save_holds_what_was_there_when_it_began_and_all_workers_agree_on_what_is_pending(
    tmp_path: Path, world: int, background: bool
) -> None:
    folder = tmp_path / "checkpoints"
    answers = run(world, train, str(folder), background)
    assert all(answer == answers[0] for answer in answers)
    newest, seen = answers[0]
    assert any(seen) == background
    found = checkpoint.newest(str(folder))
    assert found is not None and found.step == newest
    assert found.state == {"format": 3, "step": newest, "world_size": world}
    for step, location in checkpoint.committed(str(folder)):
        check(location, step)
        files = {shards.file_name(rank) for rank in range(world)} | {"index.json", "state.json", "COMMITTED"}
        assert set(names(location)) == files  # nothing that only helped to write it
    assert len(names(folder)) <= 2
    # The ledger: each file holds the steps since the one before, of all workers, in order.
    read = []
    for name in names(f"{folder}-ledger"):
        read += [json.loads(text) for text in Path(f"{folder}-ledger", name).read_text().splitlines()]
    assert name == f"step_{newest:08d}.jsonl"
    assert [entry["step"] for entry in read] == list(range(1, newest + 1))
    for entry in read:
        first = (entry["step"] - 1) * world
        assert entry["samples"] == [[f"a.jsonl:{at}"] for at in range(first, first + world)]


def test_the_host_copy_is_made_once_and_used_again(tmp_path: Path) -> None:
    keeper, _ = make(tmp_path)
    save(keeper, 1)
    first = keeper._host._buffer.data_ptr()
    save(keeper, 2)
    assert keeper._host._buffer.data_ptr() == first and keeper._host._buffer.numel() == SIZE * 4 + 4
    assert keeper.blocked_seconds > 0


# -------------------------------------------------------------------------------------------------- killed at any time


def save_and_die(folder: str, at: int | None, answer: Any) -> None:
    """Save step 3, keeping two, and be killed just before the `at`-th operation on storage; None: count them."""
    shards.BLOCK = 4096
    count = 0

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **options)

        setattr(owner, name, call)

    for owner, name in (
        *((os, name) for name in ("fsync", "replace", "unlink", "rmdir", "makedirs")),
        *((paths, name) for name in ("write_bytes", "delete_file", "delete_dir", "list_dir")),
        (shards, "checksum"),  # before each block
        (shards, "_flush_to_disk"),
    ):
        counted(owner, name)
    keeper, _ = make(folder)
    save(keeper, 3)
    answer.send(count)


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint_and_the_next_attempt_tidies_up(
    tmp_path: Path,
) -> None:
    before = tmp_path / "before"
    keeper, _ = make(before)
    for step in (1, 2):
        save(keeper, step)
    context = multiprocessing.get_context("forkserver")

    def attempt(folder: Path, at: int | None) -> int | None:
        shutil.copytree(before, folder)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_and_die, args=(str(folder), at, theirs))
        process.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            result = None
        process.join(30)
        assert process.exitcode == (0 if at is None else -signal.SIGKILL)
        return result

    operations = attempt(tmp_path / "whole", None)
    assert operations is not None and operations > 25
    newest = []
    for at in range(operations):
        folder = tmp_path / f"at-{at}"
        attempt(folder, at)
        found = checkpoint.newest(str(folder), on_broken=lambda location, why: pytest.fail(why))
        assert found is not None, at
        check(found.location, found.step)
        newest.append(found.step)
        if at % 4 == 0:
            again, lines = make(folder)
            save(again, 3)
            assert checkpoint.steps(str(folder))[-1] == 3 and not lines
            for step, location in checkpoint.committed(str(folder)):
                check(location, step)
                assert not [name for name in names(location) if "partial" in name]
            assert len(names(folder)) == len(checkpoint.committed(str(folder))) <= 3, names(folder)
    assert newest == sorted(newest) and set(newest) == {2, 3}


# ------------------------------------------------------------------------------------------------ a worker that fails


def fail_on(rank: int, world: int, folder: str, place: str) -> list[Any]:
    """Save step 1; fail at `place` in steps 2 and 3; save step 4."""
    keeper, lines = make(folder, rank, world, keep=9)
    real = getattr(*PLACES[place][:2])
    found = []
    for step in range(1, 5):
        bad = step in (2, 3) and rank == (0 if place == "commit" else world - 1)

        def call(*args: Any, bad: bool = bad, step: int = step, **options: Any) -> Any:
            if bad and PLACES[place][2](*args):
                raise OSError(28, "No space left on device")
            if place == "shard" and step == 2:  # between its folder and its file, while another worker gives up
                os.makedirs(args[0], exist_ok=True)
                time.sleep(0.3)
                assert os.path.isdir(args[0]), f"{args[0]} is gone"
            return real(*args, **options)

        setattr(*PLACES[place][:2], call)
        save(keeper, step, rank, world, line(step, rank, world))
        torch.distributed.barrier()
        found.append((keeper.newest, keeper.failed_in_a_row, keeper.pending, names(folder)))
        torch.distributed.barrier()
    return [found, lines, keeper.last_error]


def always(*args: Any) -> bool:
    return True


def is_marker(location: str, content: bytes) -> bool:
    return location.endswith("COMMITTED")


def is_part(location: str, content: bytes) -> bool:
    return "part_" in location


PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "shard": (shards, "write", always),
    "part": (paths, "write_bytes", is_part),
    "commit": (paths, "write_bytes", is_marker),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_one_worker_fails_all_abandon_the_save_and_leave_nothing(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "checkpoints"
    answers = run(2, fail_on, str(folder), place)
    found, lines, error = answers[0]
    assert [entry[:3] for entry in found] == [(1, 0, None), (1, 1, None), (1, 2, None), (4, 0, None)]
    assert [len(entry[3]) for entry in found] == [1, 1, 1, 2]  # the folders of steps 2 and 3 are gone
    failed = 0 if place == "commit" else 1
    assert error == f"worker {failed}: OSError: [Errno 28] No space left on device"
    assert lines == [
        f"the checkpoint of step {step} was not written: {error}; training goes on, that of step 1 is the newest"
        for step in (2, 3)
    ]
    assert answers[1][1:] == [[], error]  # one worker speaks, all know
    for step, location in checkpoint.committed(str(folder)):
        check(location, step)
    # What was used in the steps of the failed saves is in the ledger of the next one.
    text = Path(f"{folder}-ledger", "step_00000004.jsonl").read_text()
    assert [json.loads(entry)["step"] for entry in text.splitlines()] == [2, 3, 4]
    assert names(f"{folder}-ledger") == ["step_00000001.jsonl", "step_00000004.jsonl"]


def test_storage_that_fails_for_a_moment_costs_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def flaky(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 3:
                raise OSError("AWS Error SLOW_DOWN during PutObject operation: HTTP status 503")
            return real(*args, **options)

        return call

    for owner, name in ((shards, "write"), (paths, "write_bytes"), (paths, "read_bytes"), (paths, "list_dir")):
        monkeypatch.setattr(owner, name, flaky(getattr(owner, name)))
    keeper, lines = make(tmp_path)
    save(keeper, 1)
    assert (keeper.newest, lines) == (1, []) and calls >= 18
    [(_, location)] = checkpoint.committed(str(tmp_path))
    check(location, 1)


def test_a_fault_of_any_other_kind_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, lines = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", lambda *args: {}["what"])
        save(keeper, 1)
        assert keeper.last_error == "worker 0: KeyError: 'what'" and "there is none yet" in lines[0]
        keeper._host = host_copy.HostCopy()

        def full(*args: Any, **options: Any) -> Any:
            raise MemoryError

        patch.setattr(torch, "empty", full)
        save(keeper, 2)
        assert keeper.last_error == "worker 0: its copy in host memory: MemoryError"
    save(keeper, 3)
    assert (keeper.newest, keeper.failed_in_a_row) == (3, 0)


def test_the_copy_is_made_beside_the_next_step_and_is_there_before_it_updates_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, real = threading.Event(), host_copy.HostCopy.prepare

    def slow(host: Any, spans: Any) -> Any:
        copy = real(host, spans)
        return lambda: (computing.wait(60), copy())[1]

    monkeypatch.setattr(host_copy.HostCopy, "prepare", slow)
    written, _ = make(tmp_path)
    spans = state_of(0, 1, 1)
    keeper = Keeper(written, lambda: spans, total, resting=True)
    assert not keeper.save(1, wait=False)
    assert written._save is not None and not written._save.copied.is_set()  # training goes on meanwhile
    threading.Timer(0.1, computing.set).start()
    keeper.signals()
    for span in spans.values():
        span.data.add_(1)
    assert keeper.save(2, wait=True)
    assert checkpoint.steps(str(tmp_path)) == [1, 2]
    for step, location in checkpoint.committed(str(tmp_path)):
        check(location, step)


def test_a_copy_beside_a_step_that_finds_no_memory_is_told_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> Any:
        raise MemoryError

    keeper, lines = make(tmp_path)
    monkeypatch.setattr(host_copy.HostCopy, "prepare", lambda host, spans: full)
    keeper.begin(1, state_of(0, 1, 1), resting=True)
    keeper.await_copy()
    keeper.finish(total)
    assert keeper.last_error == "worker 0: its copy in host memory: MemoryError" and len(lines) == 1
    assert names(tmp_path) == []


def test_a_call_to_storage_that_does_not_return_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "PATIENCE", 0.05)
    released, real = threading.Event(), shards.write

    def stuck(*args: Any) -> Any:
        released.wait(60)
        return real(*args)

    monkeypatch.setattr(shards, "write", stuck)
    keeper, _ = make(tmp_path)
    keeper.begin(1, state_of(0, 1, 1))
    assert keeper.signals() == (0, 0, 0)
    keeper.advance(0, 1, 0)  # another worker failed
    assert keeper.pending is None
    stuck_thread = keeper._stuck
    assert stuck_thread is not None
    save(keeper, 2)  # the copy of step 1 is still in use: this one fails at once
    assert keeper.failed_in_a_row == 2
    assert keeper.last_error == "worker 0: the save of step 1 still waits for storage"
    released.set()
    stuck_thread.thread.join(30)
    save(keeper, 3)
    assert (keeper.newest, keeper.failed_in_a_row) == (3, 0)
    assert [step for step, _ in checkpoint.folders(str(tmp_path))] == [3]


# ------------------------------------------------------------------------------------------- other attempts, and ends


def test_who_was_cut_off_and_writes_on_reaches_nothing_of_the_new_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old attempt's worker wakes up in the middle of its save, after a new one has saved the same step."""
    released, real = threading.Event(), shards.write

    def slow(folder: str, rank: int, spans: Any, *rest: Any) -> Any:
        real(folder, rank, spans, *rest)
        released.wait(60)
        return real(folder, rank, spans, *rest)

    old, _ = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", slow)
        old.begin(5, state_of(0, 1, 666))
        while not list(tmp_path.glob("step_*/shard*")):
            threading.Event().wait(0.01)
        new, lines = make(tmp_path)
        patch.setattr(shards, "write", real)
        save(new, 5)
        [(_, location)] = checkpoint.committed(str(tmp_path))
        assert [Path(location).name] == names(tmp_path)  # what the old one had left is tidied up
        released.set()
        while not list(tmp_path.glob("*/part*")):  # it goes on, into a folder of its own that does not count
            threading.Event().wait(0.01)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None and found.location == location
    check(location, 5)
    # Even one that commits late does no harm: both are whole.
    old.finish(lambda values: values)
    for step, place in checkpoint.committed(str(tmp_path)):
        assert step == 5
        checkpoint.verify(place)
    check(location, 5)
    save(new, 6)
    assert not lines and checkpoint.steps(str(tmp_path))[-1] == 6


def leave(rank: int, world: int, folder: str, when: str) -> tuple[float, float, float]:
    """Worker 1 leaves the loop (an exception) with the save pending; worker 0 may already be committing it."""
    keeper, _ = make(folder, rank, world)
    keeper.begin(1, state_of(rank, world, 1))
    save_of = keeper._save
    assert save_of is not None
    signals = keeper.signals() if when == "before" else (0.0, 0.0, 0.0)
    while when == "after" and not keeper.signals()[0]:
        threading.Event().wait(0.01)
    torch.distributed.barrier()
    if when == "after" and rank == 0:
        keeper.advance(2, 0, 0)  # all have written: it begins to commit
        keeper.finish(lambda values: values)  # alone
    else:
        keeper.close()
        assert keeper.pending is None and not save_of.thread.is_alive()
    return signals


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_leaves_takes_nothing_away_that_rank_0_may_be_committing(tmp_path: Path, when: str) -> None:
    run(2, leave, str(tmp_path), when)
    if when == "after":
        [(_, location)] = checkpoint.committed(str(tmp_path))
        check(location, 1)
    else:
        assert checkpoint.newest(str(tmp_path)) is None


def test_the_ledger_of_lost_work_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    keeper, _ = make(folder)
    for step in (2, 4):
        save(keeper, step, ledger=line(step, 0, 1))
    for lost in (3, 5, 6):  # of an attempt that was killed before it committed them, or whose checkpoints broke
        shutil.copy(f"{folder}-ledger/step_00000004.jsonl", f"{folder}-ledger/step_{lost:08d}.jsonl")
    again, _ = make(folder)
    shutil.copy(f"{folder}-ledger/step_00000004.jsonl", f"{folder}-ledger/notes.txt")
    save(again, 6, ledger=line(5, 0, 1) + line(6, 0, 1))
    assert names(f"{folder}-ledger") == ["notes.txt", *(f"step_{step:08d}.jsonl" for step in (2, 3, 4, 6))]
    save(again, 7, ledger=line(7, 0, 1))
    assert Path(f"{folder}-ledger", "step_00000006.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- retention


def test_an_older_checkpoint_is_kept_for_each_newer_one_that_is_broken(tmp_path: Path) -> None:
    keeper, lines = make(tmp_path, keep=9)
    for step in (1, 2, 3):
        save(keeper, step)
    broken = Path(checkpoint.committed(str(tmp_path))[-1][1], "shard_00000.safetensors")
    os.truncate(broken, 10)
    keeper._keep = 2
    save(keeper, 4)
    assert checkpoint.steps(str(tmp_path)) == [2, 3, 4]  # 2 for 3
    [said] = lines
    assert str(broken) in said and "an older checkpoint is kept" in said
    save(keeper, 5)
    assert checkpoint.steps(str(tmp_path)) == [4, 5]


def test_the_last_valid_one_is_never_deleted(tmp_path: Path) -> None:
    keeper, _ = make(tmp_path, keep=9)
    for step in (1, 2, 3):
        save(keeper, step)
    for _, location in checkpoint.committed(str(tmp_path))[1:]:
        os.truncate(Path(location, "shard_00000.safetensors"), 10)
    lines: list[str] = []
    checkpoint.retain(str(tmp_path), 1, lines.append)
    assert checkpoint.steps(str(tmp_path)) == [1, 2, 3]
    assert len(lines) == 2 and all("has 10 bytes" in line and "an older checkpoint is kept" in line for line in lines)


def test_what_is_no_checkpoint_or_lies_outside_is_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    folder = tmp_path / "checkpoints"
    keeper, _ = make(outside)
    save(keeper, 1)
    [location] = outside.iterdir()
    folder.mkdir()
    for name in ("step_1", "step_00000001x", "step_00000002.broken", "notes"):
        shutil.copytree(location, folder / name)
    os.symlink(location, folder / "step_00000001-aa")
    keeper, lines = make(folder, keep=1)
    save(keeper, 5)
    assert location.exists() and (location / "shard_00000.safetensors").exists()
    assert {"step_1", "step_00000001x", "step_00000002.broken", "notes"} <= set(names(folder))
    assert len(lines) == 1 and "step_00000001-aa could not be deleted" in lines[0]


def test_a_checkpoint_that_cannot_be_deleted_is_a_line_and_stays_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, lines = make(tmp_path, keep=1)
    save(keeper, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        save(keeper, 2)
    assert keeper.newest == 2 and keeper.failed_in_a_row == 0
    assert len(lines) == 1 and "could not be deleted: [Errno 13] Permission denied" in lines[0]
    save(keeper, 3)
    assert checkpoint.steps(str(tmp_path)) == [3]


def test_types_of_every_width_lie_side_by_side_in_the_copy(tmp_path: Path) -> None:
    keeper, _ = make(str(tmp_path))
    kinds = {"model/a": torch.uint8, "model/b": torch.bfloat16, "model/c": torch.float32, "model/d": torch.int64}
    spans = {name: Span.whole(torch.arange(3).to(dtype)) for name, dtype in kinds.items()}  # odd numbers of bytes
    keeper.begin(1, spans)
    keeper.finish(lambda sums: sums)
    assert keeper.newest == 1, keeper.last_error
    found = {name: Span.whole(torch.zeros(3, dtype=dtype)) for name, dtype in kinds.items()}
    checkpoint.restore(checkpoint.committed(str(tmp_path))[-1][1], found)
    assert all(torch.equal(found[name].data, spans[name].data) for name in kinds)
