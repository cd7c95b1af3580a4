"""What Ray Train's controller decides for us: which failures are survived, how many workers start, when to grow.

Ray's own policies count failures over the whole run, try again what will fail again, take any number of workers, and
resize by killing workers between checkpoints. These ones start counting anew with each new checkpoint, give up at once
on errors that say what is wrong, take numbers that share the batch evenly, and let the workers save before they grow.

The controller runs in the process that asks for the training, without which there is no run anyway, and so does all
that Ray would start a process for at its side: each takes seconds to come up, and can be lost.

The only module that uses interfaces of Ray Train that are not public (of 2.60). tests/integration/test_path.py and
tests/multihost/test_faults.py use them all, so an upgrade that moves one is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
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
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2._internal.logging import LoggingManager
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from ray_ft.errors import RayFtError, ResourceError, StorageError
from ray_ft.hosts import choose_interface
from ray_ft.recipe import Failures
from ray_ft.retry import patiently
from ray_ft.session import SPARE_CPUS
from ray_ft.train import checkpoint
from ray_ft.train.asks import Ask, Restart

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset, ExecutionOptions

#: Seconds between the controller's looks at its workers, which is how soon a death is noticed.
LOOK_SECONDS = 1.0
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
            parts["scaling_policy"] = _EvenSizes(
                self.scaling_config, self._sizes, self._board, self._failures, self._checkpoints
            )
        parts["failure_policy"] = _Survival(self._failures, self._checkpoints, self._board)
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
        _placed.append(group)
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


# -------------------------------------------------------------------------------------------------- placement groups


_placed: list[Any] = []  # what this process has asked for


def remove_own_groups() -> None:
    """Give back what the controller in this process holds for its workers."""
    while _placed:
        _placed.pop().shutdown()


def remove_orphaned_groups() -> None:
    """Give back what trials that died held for their workers: it goes with the job alone, not with the actor."""
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    for raw in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        facts = PlacementGroupTableData.FromString(raw)
        # Of a group that no actor made, such as Ray Tune's for its trials, Ray says that its creator is dead.
        dead = facts.creator_actor_dead and facts.creator_actor_id not in (b"", ray.ActorID.nil().binary())
        if dead and facts.creator_job_id.hex() == job and facts.state != PlacementGroupTableData.REMOVED:
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(facts.placement_group_id)))


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
        blocks = rows.repartition(target_num_rows_per_block=self._global_batch // workers, strict=True)
        blocks.context.execution_options = self._options
        self._parts = [Part(found, shard) for shard in blocks.streaming_split(workers, equal=True)]

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


# ---------------------------------------------------------------------------------------------------------- failures


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


class _Survival(FailurePolicy):
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


# ------------------------------------------------------------------------------------------------------------- sizes


class _EvenSizes(ElasticScalingPolicy):
    """As many workers as there is room for, of the sizes that share the batch evenly; grows at a checkpoint."""

    def __init__(self, settings: Any, sizes: tuple[int, ...], board: Any, failures: Failures, run: str) -> None:
        super().__init__(settings)
        self._sizes, self._board, self._failures, self._run = sizes, board, failures, run
        self._waiting_since: float | None = None
        self._tried = False

    def after_controller_start(self, train_run_context: Any) -> None:
        # Reservations go by this name. One that a killed command or controller left would stand for three minutes
        # beside ours, for the same nodes; under the run's own name ours takes its place.
        self._requester_id = f"train-{self._run}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)
        self._send_resource_request()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray's reservations can still have a node that was lost a moment ago, and have those that drain: workers would
        # wait for them in vain.
        gone = draining_nodes()
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        there = {node: has for node, has in reserved_resources.items() if node in nodes and node not in gone}
        room = super()._count_possible_workers(there)
        if self._tried:  # there was none for what was tried: others hold what Ray counts as reserved for us
            room = min(room, self._free_workers())
        # The tasks that read rows need a CPU beside those that workers hold, or the workers wait for them for ever.
        cpus = sum(has.get("CPU", 0) for has in nodes.values()) - SPARE_CPUS
        each = self.scaling_config._resources_per_worker_not_none.get("CPU", 0)
        return max((size for size in self._sizes if size <= room and size * each <= cpus), default=0)

    def _free_workers(self) -> int:
        """Workers for which there is room beside all that runs now."""
        each = {name: much for name, much in self.scaling_config._resources_per_worker_not_none.items() if much}
        gone = draining_nodes()
        return sum(
            int(min(free.get(name, 0) // much for name, much in each.items()))
            for node, free in free_resources().items()
            if node not in gone
        )

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._waiting_since, self._tried = None, True
            return decision
        now, limit = time.monotonic(), self._failures.wait_seconds
        if self._waiting_since is None:
            self._waiting_since = now
            self._board.push.remote("line", f"waiting for room for {self._sizes[0]} workers, at most {limit:g} s")
        stopped = ray.get(self._board.asked.remote()) >= Ask.STOP
        if stopped or now - self._waiting_since > limit:
            why = "the run was stopped" if stopped else f"train.failures.wait_seconds = {limit:g} have passed"
            raise ResourceError(
                f"there is no room for train.workers = {self._sizes[0]}, the fewest, and {why}",
                ["add nodes to the cluster", "a smaller train.workers", "the same command continues the run"],
            )
        time.sleep(LOOK_SECONDS)  # else the controller's loop spins
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        self._tried = False
        running = worker_group_state.num_workers
        if isinstance(decision, ResizeDecision) and running < decision.num_workers <= running + self._free_workers():
            self._board.ask.remote(Ask.GROW)  # they save, end by themselves, and are counted anew
        return NoopDecision()


def free_resources() -> dict[str, dict[str, float]]:
    """What is free on each node."""
    return ray._private.state.available_resources_per_node()


def draining_nodes() -> set[str]:
    """Nodes that were told to go."""
    return set(ray._private.state.state.get_draining_nodes())


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
