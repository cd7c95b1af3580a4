"""Processes of this machine, by id and start time; nothing but the standard library."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

END_SECONDS = 60  # in which a process has to end, with all that a busy machine has to take back from it


def pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third on: the second, the name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def began(pid: int) -> int:
    """When a process started, in clock ticks: with its id it is one process for ever. 0 where there is none."""
    with contextlib.suppress(OSError):
        fields = _stat(pid)
        return 0 if fields[0] == "Z" else int(fields[19])
    return 0


def children(above: int) -> list[int]:
    return [pid for pid in pids() if parent(pid) == above]


def command_line(pid: int) -> str:
    """Empty where the process has ended, which it may do at any time."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def parent(pid: int) -> int:
    """0 where the process has ended."""
    with contextlib.suppress(OSError):
        return int(_stat(pid)[1])
    return 0


def end(pid: int, start: int, number: int) -> None:
    """Signal one process and wait until it is gone; of no effect where it ended before."""
    if not start or began(pid) != start:
        return
    with contextlib.suppress(ProcessLookupError):
        watch = os.pidfd_open(pid)
        try:
            if began(pid) == start:
                signal.pidfd_send_signal(watch, number)
                if not select.select([watch], [], [], END_SECONDS)[0]:
                    raise TimeoutError(f"process {pid} does not end")
        finally:
            os.close(watch)
