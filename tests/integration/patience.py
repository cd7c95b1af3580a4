"""Ray gives a node 30 s to come up, which no setting changes: on a busy machine a cluster takes several tries."""

from __future__ import annotations

from collections.abc import Callable

STARTS = 3


def start(begin: Callable[[], None], end: Callable[[], object]) -> None:
    """Call `begin`; where Ray ran out of its time, `end`, and begin again."""
    for attempt in range(1, STARTS + 1):
        try:
            begin()
            return
        except BaseException as error:
            end()
            if "timed out during startup" not in str(error) or attempt == STARTS:
                raise
