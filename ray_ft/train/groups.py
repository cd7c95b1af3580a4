"""Placement groups of workers that Ray forgets: given back here, or they would stand until the whole job ends."""

from __future__ import annotations

from typing import Any

import ray

_placed: list[Any] = []  # what this process has asked for


def remember(group: Any) -> None:
    """A handle of Ray Train's, for `remove_own_groups`."""
    _placed.append(group)


def remove_own_groups() -> None:
    """Give back what the controller in this process holds for its workers."""
    while _placed:
        _placed.pop().shutdown()


def forget() -> None:
    """The controller has ended, and given back what it held."""
    _placed.clear()


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
