"""What a demo's task is: rows to train on, rows held out, and the texts that its tokenizer learns words from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ray_ft.demo.base import write_base

HELDOUT = 150  # questions, each asked as often as the task asks it
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Rows of one format.

    Attributes:
        train, heldout: in their order; the first held-out ones stand for the rest.
        texts: what a row becomes, for the tokenizer.
        stored: a row as a file with this ending (".jsonl") keeps it, and the files that it names, by their path from
            that file's folder; None: as it is.
    """

    train: list[Row]
    heldout: list[Row]
    texts: Callable[[Row], list[str]]
    stored: Callable[[Row, str], tuple[Row, dict[str, bytes]]] | None = None


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        about: for people: "number words to translate".
        rows: training rows where no number is given.
        draw: makes the parts from (training rows, seed), by name; the only part of a task is named "". A DataError
            where there are not that many rows.
        parts: their names.
        write_base: writes the model's folder, as `base.write_base` does.
        layers: of the model where no number is given.
    """

    about: str
    rows: int
    draw: Callable[[int, int], dict[str, Part]]
    parts: tuple[str, ...] = ("",)
    write_base: Callable[[str, Iterable[str], int, int, int], None] = write_base
    layers: int = 4
