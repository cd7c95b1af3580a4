"""Number words of several languages, to be told apart.

Limits: the languages are not equally frequent, so that class weights and macro F1 have something to do.
"""

from __future__ import annotations

import random

from ray_ft.demo.task import Part, Row, Task
from ray_ft.demo.translation import LARGEST
from ray_ft.errors import DataError

#: Languages, and how many of a hundred rows are in each: German is rare.
LABELS = {"en": 40, "fr": 25, "es": 25, "de": 10}
HELDOUT = 400  # rows


def draw(rows: int, seed: int) -> dict[str, Part]:
    """`rows` training rows and HELDOUT held-out ones; no number is in both.

    Raises:
        DataError: there are not that many rows.
    """
    from num2words import num2words

    most = LARGEST + 1 - HELDOUT
    if not 3 <= rows <= most:  # at least one in each file
        raise DataError(f"rows = {rows:,} is not between 3 and {most:,}, all that numbers up to {LARGEST:,} give")
    rng = random.Random(seed)
    numbers = rng.sample(range(LARGEST + 1), rows + HELDOUT)
    names = [code for code, share in LABELS.items() for _ in range(share)]
    each: list[Row] = [
        {"text": num2words(number, lang=code), "label": code}
        for number, code in zip(numbers, rng.choices(names, k=len(numbers)), strict=True)
    ]
    return {"": Part(each[:rows], each[rows:], lambda row: [row["text"]])}


TASK = Task("number words of four languages, to be told apart", 4_000, draw)
