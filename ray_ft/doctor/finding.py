"""What a check of the doctor says: one finding is one thing that was looked at, and what to do if it is not well.

Pure data, without Ray: checks make findings out of facts, and the command line, `train` and tests read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How much a finding matters. Ordered: `max()` of several is the worst."""

    OK = 0  # looked at, and well
    NOTE = 1  # well, and worth knowing: what was chosen, what could not be looked at
    WARNING = 2  # a run works, but slower or less safely than it should
    ERROR = 3  # a run would fail, or would not do what it says


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Args:
        name: the check in a few words joined by dots, such as "storage.shared"; stable, for scripts and tests.
        severity: how much it matters.
        where: the node or nodes (or "cluster", "here", a path) that it is about.
        what: one sentence: what was found, with the value.
        ways_out: what the reader can do about it, one sentence each; every WARNING and ERROR has at least one.
    """

    name: str
    severity: Severity
    where: str
    what: str
    ways_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.severity >= Severity.WARNING and not self.ways_out:
            raise ValueError(f"finding {self.name} is a {self.severity.name} and says no way out")


def worst(findings: Iterable[Finding]) -> Severity:
    """The highest severity among them; OK where there are none."""
    return max((finding.severity for finding in findings), default=Severity.OK)


def names(nodes: Iterable[str], most: int = 4) -> str:
    """Several nodes in a few words: "10.0.0.1, 10.0.0.2 and 6 more"."""
    listed = sorted(nodes)
    if len(listed) <= most:
        return ", ".join(listed)
    return f"{', '.join(listed[: most - 1])} and {len(listed) - most + 1} more"
