"""What Ray Data and Ray Train cost each step and each start, by the number of workers, on cores that they share.

The model is so small that a step is nearly all overhead; it is the same step in all arms. What each step waits for rows
and for the board is timed in the worker itself, to microseconds. What is left when one arm's step is taken from the
other's also has what Ray's processes take of the cores, but is the small difference of what noise moves by far more.
More workers than cores wait for each other: the figures are upper bounds.

A round is one run of each arm with each number of workers; nearly all of its time goes into starting processes. So one
run gives several values of a step (`BLOCKS`), and one of a start.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pairs import interleaved
from benchmarks.scale import arms
from benchmarks.scale.files import write_rows
from benchmarks.scale.growth import Series
from ray_ft import demo

WORKERS = (1, 2, 4, 8)
ROUNDS = 3  # at least
ROWS = 2_000
WARM_UP = 2  # rows of metrics before the clock counts
BLOCKS = 2  # into which the rows of metrics after these are cut: each gives one value of a step
RESOLUTION = 1e-3  # s per step: differences below it say nothing
TIMED = 1e-6  # s per step: what is timed in the worker is told from nothing above it


def of_run(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of each block of steps: seconds of a step, of them waiting for rows and talking to the board; of the run: seconds
    to the first step, MiB of the first worker."""
    rows = found["rows"][WARM_UP:]
    size = len(rows) // BLOCKS
    blocks = [rows[at * size : (at + 1) * size] for at in range(BLOCKS)]

    def medians(of: Callable[[Mapping[str, float]], float]) -> list[float]:
        return [statistics.median(map(of, block)) for block in blocks]

    return {
        "step": medians(lambda row: row["step_seconds"]),
        "wait": medians(lambda row: row["step_seconds"] * row["data_wait_share"]),
        "talk": medians(lambda row: row.get(arms.TALK, 0.0)),
        "first": [found["first"]],
        "mib": [1024 * max(row["memory_gib"] for row in rows)],
    }


def series_of(measured: Mapping[int, Sequence[Mapping[str, Mapping[str, Sequence[float]]]]]) -> list[Series]:
    """What each number of workers gave, run by run: number → [way → `of_run`], as series of overheads."""

    def differ(key: str, first: str, second: str | None) -> dict[int, list[float]]:
        return {
            count: [
                value - (one[second][key][at] if second else 0.0)
                for one in runs
                for at, value in enumerate(one[first][key])
            ]
            for count, runs in measured.items()
        }

    def made(name: str, unit: str, due: float, values: dict[int, list[float]], floor: float = RESOLUTION) -> Series:
        return Series(name, "workers", unit, due, values, floor)

    return [
        made("step without Ray, rows in memory", "s", 1, differ("step", "plain", None)),
        made("Ray Data, more of a step", "s", 1, differ("step", "whole", "control")),
        made("Ray Data, waiting for rows, of a step", "s", 1, differ("wait", "whole", None), TIMED),
        made("Ray's control, more of a step", "s", 1, differ("step", "control", "plain")),
        made("Ray's control, talking to the board, of a step", "s", 1, differ("talk", "control", None), TIMED),
        made("start to the first step without Ray", "s", 1, differ("first", "plain", None)),
        made("Ray Train, more until the first step", "s", 1, differ("first", "control", "plain"), 1.0),
        made("Ray Data, more until the first step", "s", 1, differ("first", "whole", "control"), 1.0),
        made("memory of a worker", "MiB", 0, differ("mib", "whole", None), 1.0),
        made("Ray, more memory of a worker", "MiB", 0, differ("mib", "whole", "plain"), 10.0),
    ]


def series(scratch: str, repeat: int, counts: Sequence[int] = WORKERS) -> list[Series]:
    folder = Path(scratch, "workers")
    folder.mkdir(parents=True)
    base = demo.write_demo(str(folder / "demo"), rows=300, hidden_size=32, layers=2).base
    write_rows(folder / "files", 1, ROWS)
    request = {"folder": str(folder), "base": base, "counts": list(counts), "repeat": repeat}
    (folder / "request.json").write_text(json.dumps(request))
    # A process of its own: Ray ends with it, and its driver holds nothing of the other parts.
    subprocess.run([sys.executable, "-m", "benchmarks.scale.workers", str(folder / "request.json")], check=True)
    found = json.loads((folder / "found.json").read_text())
    return series_of({int(count): runs for count, runs in found.items()})


def _measure(folder: Path, base: str, counts: Sequence[int], repeat: int) -> dict[int, list[dict[str, Any]]]:
    from ray_ft import session

    number = 0

    def run(count: int, way: str) -> dict[str, list[float]]:
        nonlocal number
        number += 1
        one = arms.job(str(folder), base, str(folder / "files"), count, f"{way}-{count}-{number}")
        return of_run(arms.plain(one, str(folder)) if way == "plain" else arms.with_ray(one, way))

    every = {f"{count} {way}": (count, way) for count in counts for way in arms.WAYS}
    with session.connected():
        for way in arms.WAYS:  # the first start of all finds nothing in the page cache
            run(counts[0], way)
        # All numbers of workers in each round, or what else the machine does would look like growth.
        ways = {name: (lambda _, one=one: run(*one)) for name, one in every.items()}
        rounds = interleaved(ways, repeat, warm_up=0, show=_shown)
    return {count: [{way: one[f"{count} {way}"] for way in arms.WAYS} for one in rounds] for count in counts}


def _shown(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    return ", ".join(
        f"{name} {1000 * statistics.median(one['step']):.1f} ms a step, first {one['first'][0]:.1f} s"
        for name, one in found.items()
    )


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    where = Path(asked["folder"])
    made = _measure(where, asked["base"], asked["counts"], asked["repeat"])
    (where / "found.json").write_text(json.dumps(made))
