"""Who may train now: a trial holds a place from before it touches the cluster until it has given all of it back.

Ray Tune starts the next trial as soon as it has decided to stop one, whose workers may hold their GPUs for a while, and
a paused trial may come back before its former process has left the run directory. Here the next one waits until the
other has left, or is dead. The actor lives on the node of the sweep's own process.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

LOOK_SECONDS = 0.25
SETTLE_SECONDS = 2.0  # after a trial's death, until what it had started is dead too, and what that held can be seen


class Places:
    """Keeps the cap on trials that run at once, and tells them when the sweep ends.

    Args:
        cap: trials that may run at once.
        alive: whether the actor of an id lives; None: as the cluster says.
    """

    def __init__(self, cap: int, alive: Callable[[str], bool] | None = None) -> None:
        self._cap, self._alive = cap, alive or _alive
        self._holders: dict[int, str] = {}
        self._since: dict[int, float] = {}
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._died: float | None = None  # when a trial was found dead, until what it held is given back
        self._ending = False
        self._most = 0

    def enter(self, number: int, actor: str, before: float = 0.0) -> bool:
        """Take a place for a trial; False: not yet, as it is still in, or as many as may be are.

        Args:
            before: seconds for which it has held what it trains on without a place; they count as its own.
        """
        for other, holder in list(self._holders.items()):
            if not self._alive(holder):
                self.leave(other, holder)
                self._died = time.monotonic()
        if self._died is not None:
            if time.monotonic() < self._died + SETTLE_SECONDS:
                return False
            self._died = None
            _give_back()
        if self._ending or number in self._holders or len(self._holders) >= self._cap:
            return False
        self._holders[number], self._since[number] = actor, time.monotonic() - before
        self._most = max(self._most, len(self._holders))
        return True

    def leave(self, number: int, actor: str) -> None:
        if self._holders.get(number) == actor:
            del self._holders[number]
            self._seconds[number] += time.monotonic() - self._since[number]

    def end(self) -> None:
        """Tell all trials to end, with a checkpoint; none enters any more."""
        self._ending = True

    def ending(self) -> bool:
        return self._ending

    def inside(self) -> list[int]:
        """Trials that hold a place and live."""
        return [number for number, holder in self._holders.items() if self._alive(holder)]

    def seconds(self) -> dict[int, float]:
        """For how long each trial has held a place; of those that are in, until now."""
        now = time.monotonic()
        held = {number: now - self._since[number] for number in self._holders}
        return {number: self._seconds[number] + held.get(number, 0.0) for number in {*self._seconds, *held}}

    def most(self) -> int:
        """The most trials that ever were in at once."""
        return self._most


def place(cap: int) -> Any:
    """`Places` as an actor on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Places).remote(cap)


@contextlib.contextmanager
def held(places: Any, number: int, unwanted: Callable[[], bool], since: float | None = None) -> Iterator[bool]:
    """Wait for a place, and hold it while the block runs; False: there is none, as the sweep ends.

    Args:
        unwanted: whether it is no longer waited for, as the trial is to end.
        since: from when on this process holds what the trial trains on (monotonic); None: not before it is in.
    """
    import ray

    actor = ray.get_runtime_context().get_actor_id()
    while not ray.get(places.enter.remote(number, actor, time.monotonic() - since if since else 0.0)):
        if unwanted() or ray.get(places.ending.remote()):
            yield False
            return
        time.sleep(LOOK_SECONDS)
    try:
        yield True
    finally:
        ray.get(places.leave.remote(number, actor))


def _alive(actor: str) -> bool:
    import ray

    return (ray._private.state.actors(actor) or {}).get("State") != "DEAD"


def _give_back() -> None:
    """What the controllers of a trial whose actor died held: they died with it."""
    from ray_ft.train import groups

    groups.remove_orphaned_groups()
