"""How many runs fit at once: as many as the cluster has room for, also by growing.

A trial that was let in without room would hold what others wait for, or wait itself; so runs are packed here, worker
by worker, onto the nodes that there are and that the autoscaler may add, before any starts. Limits: CPUs and GPUs alone
count, and what other work on the cluster holds is not taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_ft.errors import ResourceError
from ray_ft.placement.nodes import Nodes, cluster
from ray_ft.recipe import Recipe
from ray_ft.session import SPARE_CPUS

__all__ = ["MOST", "Need", "Nodes", "cluster", "largest_that_fits", "on_gpus", "trials_at_once"]

#: Trials at once, where the cluster sets no limit: each is a process that this one listens to.
MOST = 1000
#: Ray counts resources in these parts.
_PARTS = 10_000


@dataclass(frozen=True)
class Need:
    """What one run reserves: `workers` times (`cpus`, `gpus`) on any nodes, and CPUs for tasks that read its data.

    Attributes:
        sizes: all numbers of workers that it may have, ascending; more than one where it is elastic. `workers` is the
            largest of them.
        reading: CPUs beside those of the workers; none where it has no workers and reads its own rows.
    """

    workers: int
    cpus: float
    gpus: int
    sizes: tuple[int, ...] = ()
    reading: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, on_gpus: bool) -> Need:
        """What a run of this recipe needs."""
        settings = recipe.train
        sizes = settings.sizes
        reading = 0 if settings.in_process else SPARE_CPUS
        return cls(sizes[-1], settings.cpus_per_worker, int(on_gpus), sizes, reading)

    @property
    def worker(self) -> str:
        """Of one worker, in words."""
        return f"{self.cpus:g} CPU{'s' * (self.cpus != 1)}" + (f" and {self.gpus} GPU" if self.gpus else "")


def on_gpus(recipe: Recipe, nodes: Sequence[Nodes]) -> bool:
    """Whether the recipe trains on GPUs; device auto: where there are some, or may come to be."""
    device = recipe.train.device
    return device == "cuda" or (device == "auto" and any(kind.resources.get("GPU", 0) >= 1 for kind in nodes))


def trials_at_once(needs: Sequence[Need], nodes: Sequence[Nodes], wanted: int | None) -> int:
    """How many trials there is room for at once, whichever of the sweep's trials they are; at most `wanted`.

    At least one where one fits, and never more than fit. Placed one after the other, not by trying every way: with CPUs
    for reading to place and nodes of several kinds it can be one trial too few.

    Args:
        needs: of the sweep's trials, at least one.

    Raises:
        ResourceError: there will never be room for one of them, not even alone.
    """
    fitting = [largest_that_fits(need, nodes) for need in dict.fromkeys(needs)]
    # Trials are started in any order, so each place has to suffice for whichever comes.
    any_of_them = Need(
        max(need.workers for need in fitting),
        max(need.cpus for need in fitting),
        max(need.gpus for need in fitting),
        reading=max(need.reading for need in fitting),
    )
    most = MOST if wanted is None else min(wanted, MOST)
    room = _Room.of(nodes, any_of_them)
    count = 0
    while count < most and room.take(any_of_them.workers):
        count += 1
    return max(count, 1)  # where many small workers and few large ones are no trial's: one at a time


def largest_that_fits(need: Need, nodes: Sequence[Nodes]) -> Need:
    """The need with as many workers as there is room for, of those it may have.

    Raises:
        ResourceError: there is none for the fewest, with the cluster to itself.
    """
    for workers in reversed(need.sizes or (need.workers,)):
        if _Room.of(nodes, need).take(workers):
            return replace(need, workers=workers, sizes=())
    raise _too_large(replace(need, workers=(need.sizes or (need.workers,))[0]), nodes)


def _too_large(need: Need, nodes: Sequence[Nodes]) -> ResourceError:
    first = "GPU" if need.gpus else "CPU"
    largest = max(nodes, key=lambda kind: (kind.resources.get(first, 0), kind.resources.get("CPU", 0)), default=None)
    ways = ["train.device=cpu"] if need.gpus else []
    if largest is None:
        return ResourceError("the cluster has no nodes", ["start some"])
    fits = _Room.of(nodes, need).slots()
    if not fits:
        enough = [kind for kind in nodes if kind.resources.get("GPU", 0) >= need.gpus]
        most = max((kind.resources.get("CPU", 0) - kind.spare_cpus for kind in enough), default=0)
        return ResourceError(
            f"a worker needs {need.worker}, and the largest node that the cluster has or may add has less: {largest}",
            [
                *([f"train.cpus_per_worker={most:g} or less"] if 0 < most < need.cpus else []),
                "add larger nodes to the cluster",
                *ways,
            ],
        )
    ways = ["nodes for them: start some, or raise max_workers of the autoscaler's node types", *ways]
    there = "the nodes that the cluster has or may add"
    if fits < need.workers:
        return ResourceError(
            f"train.workers = {need.workers} need {need.worker} each; {there} have room for {fits}, the largest of "
            f"them being {largest}",
            [f"fewer train.workers, at most train.workers={fits}", *ways],
        )
    return ResourceError(
        f"train.workers = {need.workers} need {need.worker} each, and {need.reading:g} CPU beside them to read data; "
        f"{there} have room for the workers alone",
        ["fewer train.workers", "a smaller train.cpus_per_worker", *ways],
    )


#: What is free on one node: CPUs for workers, GPUs, CPUs for reading alone; CPUs in parts.
_Free = tuple[int, int, int]


class _Room:
    """What is free on the nodes, for workers that are all alike."""

    def __init__(self, need: Need, there: Counter[_Free], possible: Counter[_Free], more: int) -> None:
        self._need, self._there, self._possible, self._more = need, there, possible, more
        self._cpus, self._reading = max(_parts(need.cpus), 1), _parts(need.reading)

    @classmethod
    def of(cls, nodes: Sequence[Nodes], need: Need) -> _Room:
        there: Counter[_Free] = Counter()
        possible: Counter[_Free] = Counter()
        for kind in nodes:
            cpus, spare = _parts(kind.resources.get("CPU", 0)), _parts(kind.spare_cpus)
            free = (max(cpus - spare, 0), int(kind.resources.get("GPU", 0)), min(spare, cpus))
            (there if kind.together is None else possible)[free] += kind.count
        more = min((kind.together for kind in nodes if kind.together is not None), default=0)
        return cls(need, there, possible, more)

    def slots(self) -> int:
        """Workers that there is room for, reading left aside."""
        count, more = sum(self._on(free) * nodes for free, nodes in self._there.items()), self._more
        for free in self._largest_first():
            count += self._on(free) * min(self._possible[free], more)
            more -= min(self._possible[free], more)
        return count

    def take(self, workers: int) -> bool:
        """Place a trial of so many workers, if it fits: True. Where it does not, nothing is taken."""
        places = [self] if not self._reading else self._with_reading()
        placed = [room for room in (place._with(workers) for place in places) if room]
        if not placed:
            return False
        best = max(placed, key=_Room.slots)
        self._there, self._possible, self._more = best._there, best._possible, best._more
        return True

    def _with_reading(self) -> list[_Room]:
        """Each way to place what reads a trial's data: on a node of each state."""
        ways = []
        for free, is_there in [*((free, True) for free in self._there), *((free, False) for free in self._possible)]:
            cpus, gpus, spare = free
            if self._nodes(free, is_there) and cpus + spare >= self._reading:
                room = self._copy()
                then = (cpus - max(self._reading - spare, 0), gpus, max(spare - self._reading, 0))
                room._change(free, is_there, then, 1)
                ways.append(room)
        return ways

    def _with(self, workers: int) -> _Room | None:
        room = self._copy()
        # Nodes on which little is left beside workers come first: the others are for what reads data.
        there = sorted(self._there, key=lambda free: (self._beside(free), free))
        for free, is_there in [*((free, True) for free in there), *((free, False) for free in self._largest_first())]:
            each = self._on(free)
            while workers and each and (nodes := room._nodes(free, is_there)):
                here = min(each, workers)  # on each of as many nodes as are filled alike
                nodes = min(nodes, workers // here)
                then = (free[0] - here * self._cpus, free[1] - here * self._need.gpus, free[2])
                room._change(free, is_there, then, nodes)
                workers -= here * nodes
        return None if workers else room

    def _nodes(self, free: _Free, is_there: bool) -> int:
        return self._there[free] if is_there else min(self._possible[free], self._more)

    def _change(self, free: _Free, is_there: bool, then: _Free, nodes: int) -> None:
        """So many nodes have less free than before; one that was not there comes to be."""
        if is_there:
            self._there[free] -= nodes
        else:
            self._possible[free] -= nodes
            self._more -= nodes
        self._there[then] += nodes
        self._there, self._possible = +self._there, +self._possible

    def _copy(self) -> _Room:
        return _Room(self._need, self._there.copy(), self._possible.copy(), self._more)

    def _largest_first(self) -> list[_Free]:
        return sorted(self._possible, key=lambda free: (-self._on(free), free))

    def _on(self, free: _Free) -> int:
        """Workers that fit on a node."""
        by_gpus = free[1] // self._need.gpus if self._need.gpus else free[0]
        return min(free[0] // self._cpus, by_gpus)

    def _beside(self, free: _Free) -> int:
        return free[0] + free[2] - self._on(free) * self._cpus


def _parts(cpus: float) -> int:
    return round(cpus * _PARTS)
