"""How many workers an elastic run starts with, and when it grows: a policy inside Ray Train's controller."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)

from ray_ft.errors import ResourceError
from ray_ft.recipe import Failures
from ray_ft.session import SPARE_CPUS
from ray_ft.train.asks import Ask

#: Seconds between the controller's looks at its workers, which is how soon a death is noticed.
LOOK_SECONDS = 1.0


class EvenSizes(ElasticScalingPolicy):
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
