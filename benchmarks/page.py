"""docs/benchmarks.md: its tables, made from the files of the results. The prose around them is written by people.

Between `<!-- summary -->` and `<!-- /summary -->` stand all figures, between `<!-- NAME -->` and `<!-- /NAME -->` those
of one benchmark with its tables and conditions. What stands between markers is replaced, all else is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.result import RESULTS, Figure, Result, read, said

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
SUMMARY = "summary"
OWN = {"scale": "scale.md"}  # results with a page of their own, which their benchmark makes; here in the summary alone
MANY = 20  # figures of one benchmark; where there are more, those that reach their aim are counted, not shown


def results(folder: Path = RESULTS) -> dict[str, Result]:
    """All results that were kept, by name."""
    return {file.stem: read(file) for file in sorted(folder.glob("*.json"))}


def made(before: str, found: dict[str, Result]) -> str:
    """The page with its tables made again.

    Raises:
        ValueError: a result has no place on the page, or a place has no result.
    """
    places = re.findall(r"^<!-- (\w+) -->$", before, flags=re.MULTILINE)
    missing = sorted(set(found) - set(places) - set(OWN))
    if missing:
        raise ValueError(f"{PAGE.name} has no place for {', '.join(missing)}: add <!-- NAME --> and <!-- /NAME -->")
    empty = sorted(set(places) - set(found) - {SUMMARY})
    if empty:
        raise ValueError(f"{PAGE.name} has a place for {', '.join(empty)}, of which there is no result in {RESULTS}")
    for place in places:
        body = _summary(found) if place == SUMMARY else _section(found[place])
        opens, closes = f"<!-- {place} -->", f"<!-- /{place} -->"
        if before.count(closes) != 1:
            raise ValueError(f"{PAGE.name}: {opens} has {before.count(closes)} ends {closes}, where one is wanted")
        start, end = before.index(opens) + len(opens), before.index(closes)
        before = f"{before[:start]}\n{body}\n{before[end:]}"
    return before


def _summary(found: dict[str, Result]) -> str:
    rows: list[Sequence[object]] = []
    for name, result in found.items():
        aimed = [figure for figure in result.figures if figure.reached is not None]
        shown = _shown(aimed)
        link = f"[{name}]({OWN.get(name, f'#{name}')})"
        rows += [(link, *figure.cells()) for figure in shown]
        if left := len(aimed) - len(shown):
            rows.append((link, f"{left} more", "", "", "yes"))
    return _table(("", "", "median (least … most)", "aim", "reached"), rows)


def _shown(figures: Sequence[Figure]) -> Sequence[Figure]:
    return figures if len(figures) <= MANY else [figure for figure in figures if not figure.reached]


def _section(result: Result) -> str:
    shown = _shown(result.figures)
    parts = [
        f"{result.compared}\n",
        _table(("", "median (least … most)", "aim", "reached"), [figure.cells() for figure in shown]),
    ]
    if left := len(result.figures) - len(shown):
        parts.append(f"\n{left} more reach their aims.")
    parts += [f"\n{table.title}:\n\n{_table(table.columns, table.rows)}" for table in result.tables]
    return "\n".join([*parts, f"\n<sub>{said(result)}</sub>"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def write(page: Path = PAGE) -> None:
    page.write_text(made(page.read_text(encoding="utf-8"), results()), encoding="utf-8")
