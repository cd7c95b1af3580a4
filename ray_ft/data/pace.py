"""How far Ray Data runs ahead of training, and what it does meanwhile: nothing.

By itself it makes blocks until its share of the object store is full, which of small rows is thousands of steps, and
then looks all the while, without a rest, whether there is room again: on two cores 1.6 steps a second were left of 2.8
(seen). Here no block is cut once `FULL` steps wait for each worker, until fewer than `LOW` do; and whenever nothing has
moved and nobody waits, it rests.

By a policy of Ray Data (of 2.60, not public), which its executor asks in each of its rounds. Those that it has by
itself stay: they bound memory where a few steps are large, and how many rows are read ahead of the cutting.
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
STALLED = 1800.0  # seconds for which a worker waits for rows and nothing moves: what Ray Data has by itself


class FewAhead(BackpressurePolicy):
    """Lets nothing start, and no more blocks be made, while enough of them wait.

    Workers take their blocks in step with one another; one that waits for rows is given some, whatever the others have.

    Raises:
        TimeoutError: in the executor, and so in each worker that asks for rows: nothing has moved for `STALLED`.
    """

    def __init__(self, data_context: Any, topology: Any, resource_manager: Any) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._first, *_, self._last = topology
        self._resting = self._starving = False
        self._before: tuple[int, ...] = ()
        self._moved = time.monotonic()

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Bytes that may be taken of what an operator's tasks have made; None: all."""
        if op is self._first:  # once a round; neither it nor the last has tasks
            self._look()
        return 0 if self._resting and op not in (self._first, self._last) else None

    def can_add_input(self, op: Any) -> bool:
        """Whether an operator may start another task. What only deals out goes on."""
        return not self._resting or op.throttling_disabled()

    def _look(self) -> None:
        dealt = self._topology[self._last]
        waiting = dealt.output_queue.num_blocks / self._last.num_output_splits()
        starving = dealt.num_waiting_consumers > 0
        self._resting = waiting >= (LOW if self._resting else FULL) and not starving
        now, before = time.monotonic(), self._before
        self._before = tuple(
            count
            for op, state in self._topology.items()
            for count in (op.metrics.num_outputs_taken, op.num_active_tasks(), state.total_enqueued_output_blocks())
        )
        if self._before != before or not (starving and self._starving):
            self._moved = now
        elif now - self._moved > STALLED:
            raise TimeoutError(f"a worker has waited for rows for {STALLED:.0f} s, in which Ray Data moved none")
        self._starving = starving
        if self._resting or (self._before == before and not starving):
            time.sleep(REST)


def few_ahead(dataset: ray.data.Dataset) -> None:
    """Have a dataset that is dealt to workers run no further ahead than that.

    It may stand still for any time while no worker asks for rows, as during an evaluation; Ray Data would give up.
    """
    policies = [*ENABLED_BACKPRESSURE_POLICIES, FewAhead]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    dataset.context.execution_no_progress_timeout_s = -1
