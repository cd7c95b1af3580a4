"""Whether a run can ever be placed, asked before hours of other work.

Ray lets a placement group that no node will ever take wait without a word. Here the recipe's workers are packed onto
the nodes that there are and that the autoscaler may add, and what fits neither is an error at once. A cluster that does
not grow by itself may still lack nodes that somebody starts, or that come back: what lacks is said in a line, and the
run waits for it. Limits: those of `capacity`; what other work holds now is not looked at, as it may end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray_ft import session
from ray_ft.errors import ResourceError
from ray_ft.placement import capacity
from ray_ft.placement.capacity import Need
from ray_ft.placement.nodes import Nodes, cluster
from ray_ft.recipe import Recipe

__all__ = ["answering_cpus", "gpus_within_reach", "lacking", "reading_cpus", "refuse_impossible", "within_reach"]

#: CPUs of one copy of a model that answers without a GPU, at most: more threads than these gain little for one batch.
ANSWERING_CPUS = 4


def refuse_impossible(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> None:
    """Refuse workers that the connected cluster will never place, whatever it grows to. Takes a second or two.

    Args:
        say: takes a line where the run would have to wait, and for what.

    Raises:
        ResourceError: what they need, and the most that there is or may come.
    """
    if recipe.train.in_process:
        return
    unread: list[str] = []
    nodes = cluster(unread.append)
    for line in unread:
        say(line)
    if why := lacking(recipe, nodes, known=not unread):
        say(f"{why}; waiting for nodes, at most train.failures.wait_seconds = {recipe.train.failures.wait_seconds:g}")


def lacking(recipe: Recipe, nodes: Sequence[Nodes], known: bool = True) -> str:
    """What the recipe's workers wait for on a cluster of these nodes; empty where they fit.

    Args:
        known: whether `nodes` are all that may come by themselves: False where an autoscaler's limits cannot be read.

    Raises:
        ResourceError: they will never fit.
    """
    need = Need.of(recipe, capacity.on_gpus(recipe, nodes))
    try:
        capacity.largest_that_fits(need, nodes)
    except ResourceError as error:
        if known and not _may_still_come(need, nodes):
            raise
        return error.what
    return ""


def _may_still_come(need: Need, nodes: Sequence[Nodes]) -> bool:
    """Whether other nodes than these may come, by hand, and would help."""
    if _grows(nodes) or any(kind.spare_cpus for kind in nodes):  # an autoscaler brings no others; nor does a laptop
        return False
    offering = [kind for kind in nodes if kind.resources]
    if not offering:  # a head that offers nothing: its workers are on their way
        return True
    try:
        capacity.largest_that_fits(Need(1, need.cpus, need.gpus), offering)
    except ResourceError:
        return False
    return True


def gpus_within_reach() -> int:
    """`within_reach` of the connected cluster."""
    return within_reach(session.gpus(), cluster())


def answering_cpus() -> int:
    """CPUs for a copy of a model that answers on the connected cluster: half of its largest node's, at most four.

    Raises:
        ResourceError: no node has any, and none may come that has.
    """
    most = max((kind.resources.get("CPU", 0) for kind in cluster() if kind.count), default=0)
    if most < 1:
        raise ResourceError(
            "the model is to answer on the cluster, and no node has CPUs for it",
            ["start nodes beside the head", "unset RAY_ADDRESS to answer on this machine"],
        )
    return max(int(min(most / 2, ANSWERING_CPUS)), 1)


def within_reach(there: int, nodes: Sequence[Nodes]) -> int:
    """GPUs for a command that would use any number of them: all that are there; where none is, those of one node.

    Of the nodes that the autoscaler may add, the kind with the fewest GPUs.
    """
    growing = [kind for kind in nodes if kind.together and kind.count]
    return there or min((gpus for kind in growing if (gpus := int(kind.resources.get("GPU", 0)))), default=0)


def reading_cpus(nodes: Sequence[Nodes], beside: Recipe | None = None) -> float | None:
    """CPUs that tasks which read data may ask an autoscaler for; None where there is none to ask.

    Those of all nodes without GPUs: beyond them it would start nodes with GPUs for such tasks. Where all nodes have
    some, those of one node.

    Args:
        beside: the recipe whose workers hold theirs meanwhile.
    """
    if not _grows(nodes):
        return None
    plain = [kind for kind in nodes if not kind.resources.get("GPU")]
    cpus, more = 0.0, min((kind.together for kind in plain if kind.together is not None), default=0)
    for kind in sorted(plain, key=lambda kind: -kind.resources.get("CPU", 0)):
        count = kind.count if kind.together is None else min(kind.count, more)
        more -= 0 if kind.together is None else count
        cpus += count * kind.resources.get("CPU", 0)
    if not cpus:
        return min((kind.resources["CPU"] for kind in nodes if kind.resources.get("CPU")), default=1)
    if beside is not None and not capacity.on_gpus(beside, nodes):
        cpus -= beside.train.world_size * beside.train.cpus_per_worker
    return max(cpus, session.SPARE_CPUS)


def _grows(nodes: Sequence[Nodes]) -> bool:
    return any(kind.together is not None for kind in nodes)
