"""docs/scale.md: its tables, made from the result. `python -m benchmarks.scale.page` makes them again from the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks import page
from benchmarks.result import RESULTS, Result, read

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def write(result: Result, to: Path = PAGE) -> None:
    """Replace what stands between `<!-- scale -->` and its end by the figures and tables of a result."""
    slow = [figure for figure in result.figures if figure.reached is False]
    shown = replace(result, figures=slow, tables=result.tables)
    to.write_text(page.made(to.read_text(encoding="utf-8"), {"scale": shown}), encoding="utf-8")


if __name__ == "__main__":
    write(read(RESULTS / "scale.json"))
