"""Ray Train's controller as we run it: in the process that asks for the training, with our policies and our rows.

Without that process there is no run anyway. So neither the controller nor what Ray would start at its side has a
process of its own: each takes seconds to come up, and can be lost.

Ray's own policies count failures over the whole run, try again what will fail again, take any number of workers, and
resize by killing workers between checkpoints. Ours start counting anew with each new checkpoint and give up at once on
errors that say what is wrong (`survival`), take numbers that share the batch evenly, and let the workers save before
they grow (`sizes`).

This module, `survival`, `sizes` and `groups` use interfaces of Ray Train that are not public (of 2.60), and no other
does. tests/integration/test_path.py and tests/multihost/test_faults.py use them all, so an upgrade that moves one is
noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.constants import (
    ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.logging import LoggingManager

from ray_ft.data import stream
from ray_ft.hosts import choose_interface
from ray_ft.recipe import Failures
from ray_ft.retry import patiently
from ray_ft.train import checkpoint, groups
from ray_ft.train.sizes import LOOK_SECONDS, EvenSizes
from ray_ft.train.survival import Survival

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset, ExecutionOptions

#: Seconds that one attempt at placing the workers takes at most; then the room is counted anew.
PLACE_SECONDS = 30.0
#: Seconds for which workers that are about to be killed may take leave of each other; one that hangs never does.
GOODBYE_SECONDS = 3


class Trainer(TorchTrainer):
    """Ray's trainer with our policies and a controller in this process.

    Args:
        dealer: gives the workers their rows.
        sizes: numbers of workers that share the batch evenly, ascending; one: no other is taken.
        board: see `board.Board`.
        checkpoints: folder in which new checkpoints appear.
    """

    def __init__(
        self,
        *args: Any,
        dealer: Dealer,
        sizes: tuple[int, ...],
        failures: Failures,
        board: Any,
        checkpoints: str,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self._dealer, self._drains, self._board, self._checkpoints = dealer, _Drains(), board, checkpoints
        self._sizes, self._failures = sizes, failures
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's cleaner of placement groups asks the dashboard, of which not every cluster has one, and then stays for
        # ever; `remove_own_groups` and `remove_orphaned_groups` do its work. Of datasets, `Dealer` does it.
        # What tells Ray's state API of a run takes the controller for an actor.
        left_out = (PlacementGroupCleanerCallback, DatasetsCallback, StateManagerCallback)
        kept = [one for one in super()._create_default_callbacks() if not isinstance(one, left_out)]
        return [*kept, self._dealer, self._drains]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if len(self._sizes) > 1:
            parts["scaling_policy"] = EvenSizes(
                self.scaling_config, self._sizes, self._board, self._failures, self._checkpoints
            )
        parts["failure_policy"] = Survival(self._failures, self._checkpoints, self._board)
        # Ray reads these from the environment alone.
        os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(self._failures.hang_seconds)
        os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = str(PLACE_SECONDS)
        os.environ[HEALTH_CHECK_INTERVAL_S_ENV_VAR] = str(LOOK_SECONDS)
        os.environ[TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S] = str(GOODBYE_SECONDS)
        os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"  # `_Drains` is it
        os.environ[ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR] = "0"  # it would log to this terminal
        _log_to_files(self.train_run_context)
        # It reaches for the storage, past our own ways of waiting for one that fails for a moment.
        controller = patiently(lambda: _Controller(**parts))
        try:
            asyncio.run(self._run(controller))
        finally:  # a group of workers that never came up is not taken down
            for callback in (self._dealer, self._drains):
                callback.stop()
            groups.forget()
        return controller.get_result()

    async def _run(self, controller: TrainController) -> None:
        running = asyncio.current_task()
        assert running is not None
        self._running = (asyncio.get_running_loop(), running)
        await controller.run()

    def cancel(self) -> None:
        """From another thread: end `fit` where it next waits, which may be in seconds, and leave the workers alone."""
        if self._running is not None:
            loop, running = self._running
            with contextlib.suppress(RuntimeError):  # it is over
                loop.call_soon_threadsafe(running.cancel)


def _log_to_files(context: Any) -> None:
    """Ray Train's own log of a run, in its session's folder alone: what concerns people, the run says itself."""
    LoggingManager.configure_controller_logger(context)
    logger = logging.getLogger("ray.train")
    logger.handlers = [handler for handler in logger.handlers if handler.name != "console" and _writes(handler)]


def _writes(handler: Any) -> bool:
    """Whether it can make its file: the session's folder may be another user's."""
    try:
        return handler.get_log_file_path() is not None
    except OSError:
        return False


class _Workers(WorkerGroup):
    """Ray's group of workers, which takes for granted that its controller is an actor, and forgets the placement group
    of workers that die while they start."""

    def _create_placement_group(self, *given: Any) -> Any:
        group = super()._create_placement_group(*given)
        groups.remember(group)
        return group

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: Mapping[str, list[Any]]
    ) -> None:
        begun = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,  # whom workers would ask for checkpoints that Ray Train keeps
                **{name: values[at] for name, values in train_context_args.items()},
            )
            for at, worker in enumerate(workers)
        ]
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers


class _Drains(PreemptionCallback):
    """Tells workers that their node was told to go, from a thread here instead of an actor."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        workers = worker_group.get_workers()
        ranks: dict[str, list[int]] = {}
        for worker in workers:
            ranks.setdefault(worker.metadata.node_id, []).append(worker.distributed_context.world_rank)
        actors = {worker.distributed_context.world_rank: worker.actor for worker in workers}
        self._watcher = PreemptionWatcher(ranks, self._poll_interval_s, actors)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None

    stop = _stop_watcher


# -------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Part:
    """What a worker that starts is given: the checkpoint that all resume from, and its share of the rows from there."""

    found: checkpoint.Found | None
    rows: DataIterator


def part() -> Part:
    """This worker's."""
    given: Any = get_train_context().dataset_shard_provider
    return given


class Dealer(WorkerGroupCallback):
    """Deals rows out in blocks of one worker's share of a step, however many workers there are this time.

    Ray's own way has an actor that does no more than this.

    Args:
        start: where the run stands, and the rows from there; asked whenever the workers start.
        global_batch: rows of a step.
        options: of the execution.
    """

    def __init__(
        self,
        start: Callable[[], tuple[checkpoint.Found | None, Dataset]],
        global_batch: int,
        options: ExecutionOptions,
    ) -> None:
        self._start, self._global_batch, self._options = start, global_batch, options
        self._parts: list[Part] = []
        self._dealt = False

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if not self._dealt and len(self._parts) == worker_group_context.num_workers:
            return  # there was no room for them: nobody has had these
        self.stop()
        # The process that deals comes up beside the workers', which takes as long. Where rows are kept in order, it
        # has no choice of whom to give them, so it need not know on which nodes the workers are.
        found, rows = self._start()
        workers = worker_group_context.num_workers
        shards = stream.deal(rows, workers, self._global_batch // workers, self._options)
        self._parts = [Part(found, shard) for shard in shards]

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._dealt = True
        return {"dataset_shard_provider": self._parts}

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process that deals, and with it the tasks that read for it."""
        if self._parts:
            coordinator: Any = self._parts[0].rows
            ray.kill(coordinator._coord_actor)
        self._parts, self._dealt = [], False


# ------------------------------------------------------------------------------------------------------- each worker


class Surroundings(WorkerCallback):
    """Prepares each worker's process, in its main thread, before the workers find each other."""

    def after_init_train_context(self) -> None:
        signal.signal(signal.SIGTERM, _on_sigterm)
        choose_interface(ray.util.get_node_ip_address())


_told = threading.Event()


def _on_sigterm(*_: Any) -> None:
    _told.set()


def leaving() -> bool:
    """Whether this worker has been told to go: SIGTERM to its process, or its node drains."""
    return _told.is_set() or get_train_context().preemption_context.preemption_info is not None
