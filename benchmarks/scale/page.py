"""docs/scale.md: its tables, made from the result. `python -m benchmarks.scale.page` makes them again from the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks import page
from benchmarks.result import RESULTS, Result, read

#: Load average at the start, for each core, above which a page says that it is not to be relied upon.
BUSY = 0.5
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def write(result: Result, to: Path = PAGE) -> None:
    """Replace what stands between `<!-- scale -->` and its end by the figures and tables of a result."""
    slow = [figure for figure in result.figures if figure.reached is False]
    shown = replace(result, figures=slow, compared=f"{result.compared}{noise(result)}")
    to.write_text(page.made(to.read_text(encoding="utf-8"), {"scale": shown}), encoding="utf-8")


def noise(result: Result) -> str:
    """What a reader has to be told of a machine that was at work already; "" of a quiet one."""
    limit, load = BUSY * result.machine["cores"], result.load[0]
    if load <= limit:
        return ""
    return (
        f" **The machine was not quiet** (load average {load} at the start, more than {limit:g}): what takes "
        "milliseconds, and whatever starts processes, is noise in it, and is to be measured again."
    )


if __name__ == "__main__":
    write(read(RESULTS / "scale.json"))
