"""What Ray Data and Ray Train cost each step and each start, by the number of workers, on cores that they share.

The model is so small that a step is nearly all overhead; it is the same step in all arms, so that what is left when one
is taken from the other is what surrounds it. More workers than cores wait for each other: the figures are upper bounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pairs import interleaved
from benchmarks.scale import arms
from benchmarks.scale.files import write_rows
from benchmarks.scale.growth import Series
from ray_ft import demo

WORKERS = (1, 2, 4, 8)
ROWS = 2_000
WARM_UP = 2  # rows of metrics before the clock counts
RESOLUTION = 1e-3  # s per step: differences below it say nothing


def of_run(found: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step, of them waiting for rows, to the first step, and GiB of the first worker."""
    rows = found["rows"][WARM_UP:]
    return {
        "step": statistics.median(row["step_seconds"] for row in rows),
        "wait": statistics.median(row["step_seconds"] * row["data_wait_share"] for row in rows),
        "first": found["first"],
        "mib": 1024 * max(row["memory_gib"] for row in rows),
    }


def series_of(measured: Mapping[int, Sequence[Mapping[str, Mapping[str, float]]]]) -> list[Series]:
    """What each number of workers gave, run by run: number → [way → `of_run`], as series of overheads."""

    def differ(key: str, first: str, second: str | None) -> dict[int, list[float]]:
        return {
            count: [one[first][key] - (one[second][key] if second else 0.0) for one in runs]
            for count, runs in measured.items()
        }

    def made(name: str, unit: str, due: float, values: dict[int, list[float]], floor: float = RESOLUTION) -> Series:
        return Series(name, "workers", unit, due, values, floor)

    return [
        made("step without Ray, rows in memory", "s", 1, differ("step", "plain", None)),
        made("Ray Data, more of a step", "s", 1, differ("step", "whole", "control")),
        made("Ray Data, waiting for rows, of a step", "s", 1, differ("wait", "whole", "control")),
        made("Ray's control, more of a step", "s", 1, differ("step", "control", "plain")),
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

    def run(count: int, way: str) -> dict[str, float]:
        nonlocal number
        number += 1
        one = arms.job(str(folder), base, str(folder / "files"), count, f"{way}-{count}-{number}")
        return of_run(arms.plain(one, str(folder)) if way == "plain" else arms.with_ray(one, way))

    found = {}
    with session.connected():
        for count in counts:
            ways = {way: (lambda _, way=way, count=count: run(count, way)) for way in arms.WAYS}
            # The first start of all finds nothing in the page cache.
            found[count] = interleaved(ways, repeat, warm_up=int(count == counts[0]), show=lambda pair: _shown(pair))
    return found


def _shown(pair: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(
        f"{way} {1000 * one['step']:.1f} ms a step, first {one['first']:.1f} s" for way, one in pair.items()
    )


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    where = Path(asked["folder"])
    made = _measure(where, asked["base"], asked["counts"], asked["repeat"])
    (where / "found.json").write_text(json.dumps(made))
