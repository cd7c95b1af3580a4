"""Which failures of workers are survived: a policy inside Ray Train's controller, and what is said of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from ray_ft.errors import RayFtError, StorageError
from ray_ft.recipe import Failures
from ray_ft.train import checkpoint
from ray_ft.train.asks import Ask, Restart
from ray_ft.train.groups import remove_own_groups


class Budget:
    """Failures in a row: the count starts anew when a checkpoint newer than at the last failure is there."""

    def __init__(self, limit: int | None, checkpoints: str) -> None:
        self.limit, self.count = limit, 0
        self._checkpoints, self._newest = checkpoints, 0
        self._newest = self._look()

    def spend(self) -> bool:
        """Count one more; False where it is one too many."""
        newest = self._look()
        if newest != self._newest:  # also an older one, since a damaged one was set aside and the steps taken again
            self.count, self._newest = 0, newest
        self.count += 1
        return self.limit is None or self.count <= self.limit

    def __str__(self) -> str:
        return f"{self.count} of {'any number' if self.limit is None else self.limit}"

    def _look(self) -> int:
        try:
            return checkpoint.newest_step(self._checkpoints)
        except StorageError:  # nothing new is known of; whoever needs the checkpoint says what is wrong
            return self._newest


class Survival(FailurePolicy):
    """Whether the workers are started again after they failed, said in a line."""

    def __init__(self, settings: Failures, checkpoints: str, board: Any) -> None:
        from ray.train import FailureConfig

        super().__init__(FailureConfig())
        self._settings, self._board = settings, board
        self._failures = Budget(settings.max_failures, checkpoints)
        self._preemptions = Budget(settings.max_preemptions, checkpoints)
        self._waiting_since: float | None = None

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        error = training_failed_error
        found = list(causes(error))
        if any(isinstance(fault, RayFtError) for fault in found):
            return FailureDecision.RAISE  # it says what is wrong, and would be wrong again
        if isinstance(error, ControllerError):
            return self._wait_for_room(error)
        self._waiting_since = None
        if restart := next((fault for fault in found if isinstance(fault, Restart)), None):
            if not restart.preempted:
                self._say(f"starting the workers again: {restart}")
                return FailureDecision.RETRY
            return self._again(self._preemptions, "preemption", str(restart))
        if isinstance(error, PreemptionError) or any(_is_preempted_actor(fault) for fault in found):
            return self._again(self._preemptions, "preemption", describe(error))
        if self._wrong_from_the_start(error):
            return FailureDecision.RAISE
        return self._again(self._failures, "failure", describe(error))

    def _again(self, budget: Budget, kind: str, why: str) -> FailureDecision:
        within = budget.spend()
        verdict = "starting again at the newest checkpoint" if within else "giving up"
        self._say(f"{why}; {kind} {budget} without a new checkpoint between: {verdict}")
        return FailureDecision.RETRY if within else FailureDecision.RAISE

    def _wait_for_room(self, error: ControllerError) -> FailureDecision:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            # Ray forgets the placement group of workers that die while they start.
            remove_own_groups()
            return self._again(self._failures, "failure", f"the workers did not start: {_last_line(error)}")
        if ray.get(self._board.asked.remote()) >= Ask.STOP:
            return FailureDecision.RAISE
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
            self._say(f"waiting for room for the workers, at most {self._settings.wait_seconds:g} s")
        return (
            FailureDecision.RETRY if now - self._waiting_since < self._settings.wait_seconds else FailureDecision.RAISE
        )

    def _wrong_from_the_start(self, error: Any) -> bool:
        """Whether the code itself failed before any step: it would again, after minutes of loading."""
        if not isinstance(error, WorkerGroupError) or ray.get(self._board.rows.remote()):
            return False
        return all(_of_own_code(fault) for fault in error.worker_failures.values())

    def _say(self, line: str) -> None:
        self._board.push.remote("lost", line)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and everything that Ray wrapped it around."""
    seen: list[BaseException] = [error]
    for fault in seen:
        yield fault
        inner = [
            getattr(fault, "cause", None),
            getattr(fault, "controller_failure", None),
            getattr(fault, "health_check_failure", None),
            fault.__cause__,
            *getattr(fault, "worker_failures", {}).values(),
            getattr(fault, "_base_exc", None),
        ]
        seen += [e for e in inner if isinstance(e, BaseException) and all(e is not s for s in seen)]


def _of_own_code(fault: BaseException) -> bool:
    """Whether the workers' own code raised it: no worker was lost, and no connection between them."""
    lost = (torch.distributed.DistError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    for cause in causes(fault):
        # A task's own exception travels as a RayTaskError; of gloo's errors there is no type.
        if isinstance(cause, lost) or (isinstance(cause, RayError) and not isinstance(cause, RayTaskError)):
            return False
        if any(word in str(cause) for word in ("gloo", "onnection")):
            return False
    return True


def describe(error: Any) -> str:
    """A line on which workers failed and how; where some are gone, what the others say of it is left out."""
    if not isinstance(error, WorkerGroupError):
        return _last_line(error)
    gone, failed = [], []
    for rank, fault in sorted(error.worker_failures.items()):
        if isinstance(fault, WorkerHealthCheckFailedError):
            gone.append(f"worker {rank} died")
        elif isinstance(fault, WorkerHealthCheckTimeoutError):
            gone.append(f"worker {rank} does not answer")
        else:
            failed.append(f"worker {rank} failed: {_last_line(fault)}")
    return ", ".join(gone or failed)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
