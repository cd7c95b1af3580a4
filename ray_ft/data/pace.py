"""How far Ray Data runs ahead of training: a few steps.

By itself it makes blocks until its share of the object store is full, which of small rows is thousands of steps, and
then looks all the while, without a rest, whether there is room again: on two cores 1.6 steps a second were left of 2.8
(seen). Here it rests once each worker has `FULL` steps waiting, until `LOW` are left.

By a policy of Ray Data (of 2.60, not public), which its executor asks in each of its rounds. Those that it has by
itself stay: they bound memory where a few steps are large.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy

if TYPE_CHECKING:
    import ray.data

FULL, LOW = 32, 16  # blocks that wait for each worker; a block is one worker's rows of one step
REST = 0.1  # seconds of one round in which there is nothing to do


class FewAhead(BackpressurePolicy):
    """Lets nothing start, and no more blocks be made, while enough of them wait."""

    def __init__(self, data_context: Any, topology: Any, resource_manager: Any) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._first, *_, self._last = topology
        self._resting = False

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Bytes that may be taken of what an operator's tasks have made; None: all."""
        if op is self._first:  # once a round
            self._look()
        return 0 if self._resting else None

    def can_add_input(self, op: Any) -> bool:
        """Whether an operator may start another task. What only deals out goes on."""
        return not self._resting or op.throttling_disabled()

    def _look(self) -> None:
        waiting = self._topology[self._last].output_queue.num_blocks / self._last.num_output_splits()
        self._resting = waiting >= (LOW if self._resting else FULL)
        if self._resting:
            time.sleep(REST)


def few_ahead(dataset: ray.data.Dataset) -> None:
    """Have a dataset that is dealt to workers run no further ahead than that."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, FewAhead]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
