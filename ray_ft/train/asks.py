"""What workers and whoever watches them say to each other: what is asked of the loop, and why its workers start again.

Loads nothing, as Ray's actors between them are processes of their own, each of which would load it anew.
"""

from __future__ import annotations

from enum import IntEnum


class Ask(IntEnum):
    """What is asked of the loop; each but the first ends it after the step under way, all but the last with a
    checkpoint."""

    NOTHING = 0
    GROW = 1
    """To make way for more workers."""
    LEAVE = 2
    """To make way, as a worker has to go."""
    STOP = 3
    """To end the run."""
    DROP = 4
    """To end the run at once: what it did since its last checkpoint is not wanted."""


class Restart(Exception):
    """This start of the workers is over, so that another can begin where the run stands; not a failure.

    Args:
        why: for people.
        preempted: whether a worker had to go.
    """

    def __init__(self, why: str, preempted: bool = False) -> None:
        super().__init__(why, preempted)
        self.why, self.preempted = why, preempted

    def __str__(self) -> str:
        return self.why
