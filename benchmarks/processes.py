"""Memory of a process and all below it, sampled while it runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class Peak:
    """Bytes at the most at any one time, over all processes together.

    Attributes:
        shared_once: the sum of PSS: a page that several map, such as those of the object store, counts once.
        resident: the sum of RSS, in which it counts for each.
        alone: that of the process with the most, PSS.
    """

    shared_once: int
    resident: int
    alone: int


def of_tree(process: psutil.Process) -> Peak:
    """What a process and its descendants hold now."""
    pss, rss = [0], [0]
    for one in [process, *process.children(recursive=True)]:
        try:
            memory = one.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):  # gone meanwhile
            continue
        pss.append(getattr(memory, "pss", memory.rss))  # other systems than Linux have none
        rss.append(memory.rss)
    return Peak(sum(pss), sum(rss), max(pss))


def peak_of(command: Sequence[str], environment: Mapping[str, str]) -> tuple[Peak, float]:
    """Run a command to its end: the largest of each figure, and seconds. Exits where it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL)
    peak = Peak(0, 0, 0)
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = largest(peak, of_tree(watched))
            time.sleep(EVERY_SECONDS)
    except psutil.NoSuchProcess:
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} … exited with {process.returncode}")
    return peak, time.monotonic() - began


def largest(one: Peak, other: Peak) -> Peak:
    """Of each figure the larger."""
    return Peak(max(one.shared_once, other.shared_once), max(one.resident, other.resident), max(one.alone, other.alone))
