"""Why an engine failed: from what Ray was told, and from what the engine's own processes wrote, which know more.

vLLM fails in processes of its own; the actor that started them only learns that they did. Limits: the logs of this node
alone.
"""

from __future__ import annotations

import re
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_CAUSE = re.compile(r"(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)): ?\S")
#: What vLLM sets before each line: (Worker pid=12) ERROR 11-21 02:58:41 [core.py:953]
_ERROR = re.compile(r"^\(\w[\w-]* pid=\d+\) ERROR [\d: -]+\[[^\]]+\] ?(.*)$")
_PREFIX = re.compile(r"^(?:\(\w[\w-]* pid=\d+\)|[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\]|\s)*")


def cause(told: str, logs: Path, before: int = 0) -> tuple[str, list[str]]:
    """(The line that names the cause, up to `before` lines that the engine wrote before it).

    Args:
        told: what Ray says of the actor that failed.
        logs: Ray's log folder on this node.
    """
    plain = _ESCAPES.sub("", told)
    written = _written(plain, logs)
    errors = [[match[1] for match in map(_ERROR.match, lines) if match] for lines in written]
    rest = [[_PREFIX.sub("", line) for line in lines] for lines in written]
    for lines in (*errors, *rest):
        at = next((i for i, line in enumerate(lines) if _CAUSE.match(line)), None)
        if at is not None:  # the first is the cause, later ones are processes that noticed
            return lines[at], lines[max(0, at - before) : at]
    causes = [line.strip() for line in plain.splitlines() if _CAUSE.match(line.strip())]
    return (causes or plain.strip().splitlines() or ["no reason given"])[-1], []


def _written(plain: str, logs: Path) -> list[list[str]]:
    """The lines of each log of the actor that failed."""
    actor = re.search(r"pid=(\d+)", plain)
    if actor is None:
        return []
    files = [*sorted(logs.glob(f"worker-*-{actor[1]}.out")), *sorted(logs.glob(f"worker-*-{actor[1]}.err"))]
    return [_ESCAPES.sub("", file.read_text(errors="replace")).splitlines() for file in files]
