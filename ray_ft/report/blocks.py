"""What a section of the page is made of. The template shows each kind in one way; all text is escaped there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_ft.report.charts import Chart


@dataclass(frozen=True)
class Table:
    """Cells are text already. `left` are the columns of words; all others are numbers, set to the right.

    `closed`: the script hides it behind its caption where charts show the same; without a script, and in print without
    charts, it stays open.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: Sequence[int] = (0,)
    closed: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Charts:
    charts: Sequence[Chart]
    kind: str = "charts"


@dataclass(frozen=True)
class Text:
    """A paragraph; `command` is set in code behind it."""

    text: str
    command: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Missing:
    """There is nothing to show: why, and the command that fills it."""

    text: str
    command: str = ""
    kind: str = "missing"


@dataclass(frozen=True)
class Pre:
    """A text as it is, behind its caption."""

    caption: str
    text: str
    kind: str = "pre"


@dataclass(frozen=True)
class Answers:
    """Prompts with what was answered: (prompt, origin, ((title, text, good), …)); good is True, False or None."""

    items: Sequence[tuple[str, str, Sequence[tuple[str, str, bool | None]]]]
    caption: str = ""
    kind: str = "answers"


@dataclass
class Section:
    anchor: str
    title: str
    blocks: list[Any] = field(default_factory=list)


def number(value: Any, digits: int = 4) -> str:
    """A number for a table: thousands set apart, `digits` that count; — where there is none."""
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == int(value) and abs(value) < 1e15 and (isinstance(value, int) or abs(value) >= 10**digits):
        return f"{int(value):,}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.{digits - 2}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def share(value: Any) -> str:
    return "—" if value is None else f"{value:.2%}" if abs(value) < 0.01 else f"{value:.1%}"
