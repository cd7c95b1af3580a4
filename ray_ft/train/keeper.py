"""What the loop needs so that nothing is lost: checkpoints behind its back, and the record of the samples it used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ray_ft.data.ledger import Ledger
from ray_ft.data.stream import Batch
from ray_ft.errors import StorageError
from ray_ft.span import Span
from ray_ft.train.saver import Saver

METRICS = "metrics"  # in a checkpoint's state: rows of metrics since the one before
UNSAVED = 3  # checkpoints in a row that may fail before the run is ended: what it does is then not kept


@dataclass
class Keeper:
    """All workers call every method at the same steps.

    Args:
        spans: gives what a checkpoint holds; called between steps.
        all_reduce: sums a tensor over the workers.
        ledger: None: samples are not recorded.
        resting: what a checkpoint holds changes in no step before its `signals` are asked for.
    """

    saver: Saver
    spans: Callable[[], Mapping[str, Span]]
    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    ledger: Ledger | None = None
    resting: bool = False
    _rows: list[dict[str, float]] = field(default_factory=list)

    def signals(self) -> tuple[float, ...]:
        """Numbers whose sums over all workers `advance` wants after the step; asked for before it updates anything."""
        self.saver.await_copy()
        return self.saver.signals()

    def advance(self, sums: list[float]) -> None:
        """Take the checkpoint that is being written one stage further."""
        written, failed, committed = sums
        self.saver.advance(written, failed, committed)

    def used(self, step: int, batch: Batch) -> None:
        """Record this worker's samples of a finished step."""
        if self.ledger is not None:
            self.ledger.add(step, batch)

    def noted(self, row: dict[str, float]) -> None:
        """Keep a row of metrics for the next checkpoint: who logs it may be lost before it is written."""
        self._rows.append(dict(row))  # more is added to it while a thread writes this one

    def save(self, step: int, wait: bool) -> bool:
        """Begin a checkpoint of a finished step; `wait`: until it is there, or has failed. Returns whether it is."""
        self.saver.finish(self.all_reduce)  # the one before, where storage takes longer than the steps between
        if self.saver.newest is not None:  # what a committed one holds is safe
            self._rows = [row for row in self._rows if row["step"] > self.saver.newest]
        ledger = self.ledger.take() if self.ledger is not None else b""
        self.saver.begin(step, self.spans(), ledger, {METRICS: list(self._rows)}, self.resting and not wait)
        if wait:
            self.saver.finish(self.all_reduce)
        return self.saver.newest == step

    def check(self, step: int, needed: bool) -> None:
        """End the run where too little of it is kept.

        Args:
            needed: whether the checkpoint of `step` is the run's last.

        Raises:
            StorageError: it could not be written, or `UNSAVED` in a row could not.
        """
        saver = self.saver
        lost = needed and saver.newest != step
        if lost or saver.failed_in_a_row >= UNSAVED:
            what = f"the checkpoint of step {step}" if lost else f"{saver.failed_in_a_row} checkpoints in a row"
            kept = "there is none" if saver.newest is None else f"of step {saver.newest}"
            raise StorageError(
                f"{what} could not be written: {saver.last_error}; the newest whole one: {kept}",
                ["make room on run.storage, or mend the way to it", "train again: it resumes at the newest checkpoint"],
            )
