"""Columns that fit a terminal, and the words of their cells: settings, metrics, times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table as Grid
from rich.text import Text

GAP = 2  # cells between columns
WIDEST, NARROWEST = 40, 8  # cells that a setting is cut to where there is room, and where there is little
LEFT_OUT = 3  # cells of "+12", the number of settings that do not fit


@dataclass(frozen=True)
class Column:
    """Cells of one column, a row each.

    Attributes:
        width: in cells; what is longer is cut.
    """

    title: str
    cells: Sequence[RenderableType]
    width: int
    right: bool = False

    @classmethod
    def of(cls, title: str, cells: Sequence[str], right: bool = False, least: int = 0) -> Column:
        """As wide as its longest cell, and as `least`: where cells come and go, the others should not move."""
        return cls(title, cells, max(least, *(cell_len(cell) for cell in (title, *cells))), right)


def fitting(first: Sequence[Column], settings: Sequence[Column], extra: Sequence[Column], width: int) -> list[Column]:
    """The columns for `width` cells.

    Args:
        first: always shown.
        settings: cut as little as lets all of them fit; where that is too much, the last ones are left out and counted.
        extra: each where there is room left.
    """
    chosen = [*first, *_fitted(settings, width - _cells(first))]
    if left_out := len(first) + len(settings) - len(chosen):
        chosen.append(Column(f"+{left_out}", [""] * len(first[0].cells), LEFT_OUT))
    for column in extra:
        if _cells([*chosen, column]) <= width:
            chosen.append(column)
    return chosen


def _fitted(columns: Sequence[Column], room: int) -> list[Column]:
    """As many of the columns as `room` cells have place for, the first ones, none wider than it has to be cut to."""
    for count in range(len(columns), 0, -1):
        note = 0 if count == len(columns) else LEFT_OUT + GAP
        for widest in range(WIDEST, NARROWEST - 1, -1):
            cut = [replace(column, width=min(column.width, widest)) for column in columns[:count]]
            if _cells(cut) + note <= room:
                return cut
    return []


def _cells(columns: Sequence[Column]) -> int:
    return sum(column.width + GAP for column in columns)


def grid(columns: Sequence[Column], styles: Sequence[str | None]) -> Grid:
    """The table of these columns, one line each row.

    Args:
        styles: of each row.
    """
    table = Grid(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            width=column.width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for place, style in enumerate(styles):
        cells = [column.cells[place] for column in columns]
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)  # no markup
    return table


def packed(parts: Sequence[Text], width: int) -> Text:
    """Parts beside each other, on as few lines as they fit; a part that is longer than a line is cut."""
    lines: list[list[Text]] = [[]]
    for part in parts:
        if lines[-1] and sum(one.cell_len + 3 for one in lines[-1]) + part.cell_len > width:
            lines.append([])
        lines[-1].append(part)
    text = Text("\n").join(Text("   ").join(line) for line in lines)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


# ------------------------------------------------------------------------------------------------------------- words


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Recipe keys → their last parts, as many as tell them apart: train.optimizer.lr is lr where no other key is."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    names = {}
    for key in keys:
        count = key.count(".") + 1
        alone = (n for n in range(1, count) if sum(ending(other, n) == ending(key, n) for other in keys) == 1)
        names[key] = ending(key, next(alone, count))
    return names


def setting_text(value: Any) -> str:
    """A setting on one line: numbers with three digits, text as it is, all else as JSON."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False)


def number_text(value: float) -> str:
    """A metric: 0.0123, 123.4, 12,345, 1.2e-05."""
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}" if size < 100 else f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def hours_text(hours: float) -> str:
    return f"{hours:.3f}" if hours < 1 else f"{hours:.2f}" if hours < 100 else f"{hours:,.0f}"
