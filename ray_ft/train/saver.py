"""Checkpoints behind the back of the training loop, which waits at most while its state is copied to host memory.

`begin` has what this worker owns copied, beside the next forward and backward pass where these leave it as it is, and
a thread writes the copy. The threads talk to nobody: that all workers have
written travels as three numbers in an all-reduce that the loop makes in each step anyway, and what they have written
lies beside it in storage, as ``part_00000.json``. So workers always agree on which save is pending, and no collective
waits in a thread. Then rank 0's thread reads the parts and commits.

A save either commits or is abandoned by all workers, which delete what they wrote, so that a full disk gets its space
back; training goes on. A killed process leaves a folder without its marker, which does not count; the next attempt
deletes it after its first own checkpoint.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ray_ft import collector, paths
from ray_ft.errors import RayFtError, first_line
from ray_ft.retry import patiently
from ray_ft.span import Span
from ray_ft.train import checkpoint, shards
from ray_ft.train.host_copy import HostCopy
from ray_ft.train.shards import Stopped

#: Seconds for which training waits, after a failed save, for a thread in a call to storage that does not return.
PATIENCE = 30.0
#: Seconds without a block written or a call to storage answered, after which a save is given up.
SILENCE = 600.0


class Saver:
    """Writes the checkpoints of one worker. All workers call `begin`, `advance` and `finish` at the same steps.

    Args:
        folder: the run's checkpoints.
        keep: valid checkpoints that are kept.
        details: what state.json holds besides the format and the step.
        background: False: `begin` copies nothing, and the caller calls `finish` before it changes any span. Host memory
            then holds one block at a time.
        say: called on rank 0, from the thread that calls `advance`, with lines for people.
        ledger_folder: gets ``step_XXXXXXXX.jsonl`` with each checkpoint whose `begin` was given a ledger.
        newest: step of the checkpoint that the run resumed from.

    Attributes:
        pending: step of the save that is neither committed nor abandoned.
        newest: step of the newest committed checkpoint.
        failed_in_a_row: saves that were abandoned since the last one that was committed.
        last_error: why the last of them was.
        blocked_seconds: for which the last save kept training waiting, `await_copy` included.
    """

    def __init__(
        self,
        folder: str,
        keep: int,
        rank: int,
        world: int,
        details: dict[str, Any],
        background: bool,
        say: Callable[[str], None],
        ledger_folder: str,
        newest: int | None = None,
    ) -> None:
        self._folder, self._keep, self._rank, self._world = folder, keep, rank, world
        self._details, self._background, self._say, self._ledger_folder = details, background, say, ledger_folder
        self.newest = newest
        self.pending: int | None = None
        self.failed_in_a_row = 0
        self.last_error: str | None = None
        self.blocked_seconds = 0.0
        self._host = HostCopy()
        self._save: _Save | None = None
        self._stuck: _Save | None = None
        self._attempt = ""
        self._saves = 0
        self._unsaved = b""
        self._leftovers: list[str] | None = None

    def begin(
        self,
        step: int,
        spans: Mapping[str, Span],
        ledger: bytes = b"",
        notes: Mapping[str, Any] | None = None,
        resting: bool = False,
    ) -> None:
        """Start to save a step; nothing may be pending. What fails shows in `signals`, as the other workers must know.

        Args:
            ledger: this worker's lines since the last `begin`; those of a save that fails go with the next one.
            notes: what state.json holds beside `details`; rank 0's counts.
            resting: the caller changes no span before it has called `await_copy`; the thread copies them meanwhile.
        """
        assert self.pending is None, "a save is pending"
        began = time.perf_counter()
        self._unsaved += ledger
        location = paths.join(self._folder, checkpoint.name(step, self._next_attempt()))
        save = _Save(self, location, step, self._unsaved, {**self._details, **(notes or {})})
        self.pending, self._save = step, save
        if self._stuck is not None and self._stuck.thread.is_alive():
            save.fail(f"the save of step {self._stuck.step} still waits for storage")
        else:
            self._stuck = None
            try:
                if self._background:
                    save.copy = self._host.prepare(spans)
                    if not resting:
                        save.take_copy()
                else:
                    save.spans = shards.owned(spans)
                save.thread.start()
            except (RuntimeError, MemoryError) as error:  # no memory for the copy, or no thread
                save.fail(f"its copy in host memory: {first_line(error)}")
                save.copied.set()
        self.blocked_seconds = time.perf_counter() - began

    def _next_attempt(self) -> str:
        """The same on all workers, and never the same again."""
        if not self._attempt:
            drawn = [uuid.uuid4().hex[:8]]
            if self._world > 1:
                torch.distributed.broadcast_object_list(drawn, src=0)
            self._attempt = drawn[0]
        self._saves += 1
        return f"{self._attempt}{self._saves:04x}"

    def await_copy(self) -> None:
        """Wait until the pending save needs the spans no longer: from here on they may be changed."""
        save = self._save
        if save is None or save.copy is None:
            return
        began = time.perf_counter()
        save.copied.wait()
        self.blocked_seconds += time.perf_counter() - began

    def signals(self) -> tuple[float, float, float]:
        """(written, failed, committed) of this worker's part in the pending save, 0 or 1 each."""
        save = self._save
        if save is None:
            return 0.0, 0.0, 0.0
        save.check_alive()
        save.offered = save.written
        return float(save.offered), float(save.failed), float(save.committed)

    def advance(self, written: float, failed: float, committed: float) -> None:
        """Go on with the pending save, by the sums of the workers' `signals`."""
        save = self._save
        if save is None:
            return
        if committed:
            self._end(save, _Verdict.DONE)
            self.newest, self.failed_in_a_row, self._unsaved = save.step, 0, b""
        elif failed:
            self._end(save, _Verdict.ABANDON)
            self.failed_in_a_row += 1
            self.last_error = self._why(save)
            kept = "there is none yet" if self.newest is None else f"that of step {self.newest} is the newest"
            if self._rank == 0:
                self._say(
                    f"the checkpoint of step {save.step} was not written: {self.last_error}; training goes on, {kept}"
                )
        elif written == self._world and self._rank == 0:
            save.tell(_Verdict.COMMIT)

    def finish(self, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Wait until the pending save is committed or abandoned, if there is one.

        Args:
            all_reduce: sums a tensor (float64 [3], in host memory) over the workers.
        """
        began = time.perf_counter()
        while self._save is not None:
            if self._save.busy():
                self._save.changed.wait(1.0)  # no longer: where another worker failed, this one should hear of it
            self._save.changed.clear()
            sums = all_reduce(torch.tensor(self.signals(), dtype=torch.float64))
            self.advance(*sums.tolist())
        if not self._background:
            self.blocked_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Abandon what is pending; no other worker is asked."""
        save = self._save
        if save is not None:
            # Where the others may have been told that this part is written, rank 0 may be committing it.
            self._end(save, _Verdict.DONE if save.offered else _Verdict.ABANDON)
        if self._stuck is None:
            self._host.free()

    def _note_leftovers(self, mine: str) -> None:
        """What other attempts have left uncommitted, as of this one's first save; what they write later is not looked
        for, as it could belong to an attempt that lives."""
        if self._leftovers is None:
            there = [location for _, location in checkpoint.folders(self._folder) if location != mine]
            self._leftovers = [location for location in there if not checkpoint.is_committed(location)]

    def _end(self, save: _Save, verdict: _Verdict) -> None:
        save.tell(verdict)
        if save.thread.is_alive():
            save.thread.join(PATIENCE)
        if save.thread.is_alive():
            self._stuck = save  # it holds the host copy
        self._save = self.pending = None
        if self._rank == 0:
            for line in save.lines:
                self._say(line)

    def _why(self, save: _Save) -> str:
        """What went wrong, of all workers; all are here, and none of their threads is in a collective."""
        reasons: list[Any] = [save.reason]
        if self._world > 1:
            reasons = [None] * self._world
            torch.distributed.all_gather_object(reasons, save.reason)
        said = [f"worker {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        if not said:
            return "a worker failed without saying why"
        return said[0] + (f" (and {len(said) - 1} other workers)" if len(said) > 1 else "")


class _Verdict(enum.Enum):
    COMMIT = enum.auto()
    ABANDON = enum.auto()
    DONE = enum.auto()


class _Save:
    """One worker's part in one save. The flags only ever go up."""

    def __init__(self, saver: Saver, location: str, step: int, ledger: bytes, details: dict[str, Any]) -> None:
        # A daemon: one that is stuck must not keep the process alive.
        self.thread = threading.Thread(target=self._run, name=f"save step {step}", daemon=True)
        self.saver, self.location, self.step, self.ledger, self.details = saver, location, step, ledger, details
        self.rank = saver._rank
        self.spans: dict[str, Span] = {}
        self.copy: Callable[[], dict[str, Span]] | None = None  # taken once, here or in the thread
        self.copied = threading.Event()
        self.written = self.failed = self.committed = False
        self.reason: str | None = None
        self.heard = time.monotonic()
        self.offered = False  # once the others may know that this part is written, it is theirs to count on
        self.changed = threading.Event()
        self.lines: list[str] = []
        self._told = threading.Condition()
        self._verdict: _Verdict | None = None
        self._abandoned = threading.Event()
        self._ended = threading.Event()
        self._deleted = False

    def tell(self, verdict: _Verdict) -> None:
        """Called by the training thread; a commit that was told is not taken back."""
        with self._told:
            self._verdict = self._verdict or verdict
            if verdict is _Verdict.ABANDON:
                self._abandoned.set()
            if verdict is not _Verdict.COMMIT:
                self._ended.set()
            self._told.notify()

    def fail(self, reason: str) -> None:
        self.reason, self.failed = reason, True
        self.changed.set()

    def check_alive(self) -> None:
        """Fail where the thread is stuck in a call to storage, or has died: the other workers must hear of it."""
        if not self.busy() or self.thread.ident is None:
            return
        silent = time.monotonic() - self.heard
        if not self.thread.is_alive() and self.busy():
            self.fail("its thread has died")
        elif silent > SILENCE:
            self.fail(f"storage has not answered for {silent:.0f} s")

    def _stopped(self) -> bool:
        self.heard = time.monotonic()
        return self._abandoned.is_set()

    def busy(self) -> bool:
        """Whether the thread is at work, not waiting to be told something."""
        at_work = not self.written or (self._verdict is _Verdict.COMMIT and not self.committed)
        return at_work and not self.failed

    def take_copy(self) -> None:
        assert self.copy is not None
        try:
            self.spans = self.copy()
        finally:
            self.copied.set()  # whoever waits for it has to hear also that there is none

    def _run(self) -> None:
        if self.copy is not None and not self.copied.is_set():
            try:
                self.take_copy()
            except (RuntimeError, MemoryError) as error:
                self.fail(f"its copy in host memory: {first_line(error)}")
                return
        try:
            self._write()
            self.written = True
            self.changed.set()
            if self._hear() is _Verdict.COMMIT:
                self.heard = time.monotonic()
                self._commit()
                self.committed = True
                self.changed.set()
        except Stopped:
            pass
        except Exception as error:  # of any kind: the other workers must hear of it, and training goes on
            try:
                self._delete_files()  # before anybody hears: then the space is there again
            finally:
                if not self._abandoned.is_set():  # after that, an error is no reason
                    named = f"{type(error).__name__}: {first_line(error)}"
                    self.fail(error.what if isinstance(error, RayFtError) else named)
            self._ended.wait()  # until then others write into the folder: without it they would fail too, and say that
            self._delete_folder()
            return
        if self._abandoned.is_set() and not self.committed:
            self._delete_files()
            self._delete_folder()

    def _hear(self) -> _Verdict | None:
        with self._told:
            self._told.wait_for(lambda: self._verdict is not None)
            return self._verdict

    def _write(self) -> None:
        if self.rank == 0:
            self.saver._note_leftovers(self.location)
        written = patiently(lambda: shards.write(self.location, self.rank, self.spans, self._stopped), self._abandoned)
        if self.ledger:
            self._put(_ledger_name(self.rank), self.ledger)
        self._put(_part_name(self.rank), json.dumps({**written, "ledger": bool(self.ledger)}).encode())

    def _put(self, file: str, content: bytes) -> None:
        patiently(lambda: paths.write_bytes(paths.join(self.location, file), content), self._abandoned)

    def _get(self, file: str) -> bytes:
        try:
            return patiently(lambda: paths.read_bytes(paths.join(self.location, file)), self._abandoned)
        except FileNotFoundError:
            raise checkpoint.incomplete(self.location, [file]) from None

    # ------------------------------------------------------------------------------------------------- rank 0 alone

    def _commit(self) -> None:
        saver = self.saver
        said = [self._get(_part_name(rank)) for rank in range(saver._world)]
        with collector.paused():
            parts = [json.loads(text) for text in said]
        del said
        ledgers = [self._get(_ledger_name(rank)) for rank, part in enumerate(parts) if part.pop("ledger")]
        if ledgers:
            self._write_ledger(ledgers)
        checkpoint.commit(self.location, self.step, parts, self.details)
        # It counts. From here on nothing is worth a failed save.
        try:
            for rank in range(saver._world):
                self._delete(_part_name(rank))
                if ledgers:
                    self._delete(_ledger_name(rank))
            checkpoint.retain(saver._folder, saver._keep, self.lines.append)
            self._delete_leftovers()
        except (OSError, RayFtError) as error:
            self.lines.append(f"older checkpoints could not be looked through: {first_line(error)}")

    def _write_ledger(self, ledgers: Sequence[bytes]) -> None:
        """Those of other attempts at the steps since the last checkpoint go: their work is lost, or was this one's."""
        from ray_ft.data.ledger import merge

        folder = self.saver._ledger_folder
        kept = {step for step, _ in checkpoint.committed(self.saver._folder)}
        before = max((step for step in kept if step < self.step), default=0)
        for entry in patiently(lambda: paths.list_dir(folder), self._abandoned):
            match = re.fullmatch(r"step_(\d+)\.jsonl", entry)
            if match and not 0 < int(match[1]) <= before and int(match[1]) not in {self.step, *kept}:
                stale = paths.join(folder, entry)
                patiently(lambda place=stale: paths.delete_file(place), self._abandoned)  # type: ignore[misc]
        merged = merge(ledgers)
        target = paths.join(folder, f"{checkpoint.name(self.step)}.jsonl")
        patiently(lambda: paths.write_bytes(target, merged), self._abandoned)

    def _delete_leftovers(self) -> None:
        for location in self.saver._leftovers or []:
            if not checkpoint.is_committed(location):
                checkpoint.delete(location, self.lines.append)
        self.saver._leftovers = []

    # --------------------------------------------------------------------------------------------------- abandoning

    def _delete_files(self) -> None:
        """Delete what this worker has written."""
        mine = [shards.file_name(self.rank), _part_name(self.rank), _ledger_name(self.rank)]
        if self.rank == 0:
            mine = [checkpoint.COMMITTED, *mine, shards.INDEX, checkpoint.STATE]
        # What stays does not count; rank 0 tries again after the next checkpoint.
        self.saver._leftovers = [*(self.saver._leftovers or []), self.location]
        try:
            for file in mine:
                self._delete(file)
        except OSError as error:
            self.lines.append(f"{self.location} could not be deleted: {first_line(error)}")
        else:
            self._deleted = True

    def _delete_folder(self) -> None:
        """Delete the folder, where the last worker's files are gone from it."""
        if not self._deleted:  # training waits for this: a store that fails is not asked again
            return
        try:
            if not paths.list_dir(self.location):
                paths.delete_dir(self.location)
        except OSError as error:
            self.lines.append(f"{self.location} could not be deleted: {first_line(error)}")

    def _delete(self, file: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            paths.delete_file(paths.join(self.location, file))


def _part_name(rank: int) -> str:
    return f"part_{rank:05d}.json"


def _ledger_name(rank: int) -> str:
    return f"ledger_{rank:05d}.jsonl"
