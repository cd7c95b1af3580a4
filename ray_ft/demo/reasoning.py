"""Sums of two numbers: the reasoning spells the digits from the last to the first, the answer is the number.

Limits: numbers of three digits, so that places in the text tell places in the number.
"""

from __future__ import annotations

import random

from ray_ft.demo.task import HELDOUT, Part, Row, Task
from ray_ft.errors import DataError

PROMPT = "What is {question}? Think first."
COMPLETION = "<think>{reasoning}</think>{answer}"
"""Templates of the quickstart's recipe; the tokenizer learns their words too."""

LEAST, MOST = 100, 999
PLACES = ("ones", "tens", "hundreds")


def draw(rows: int, seed: int) -> dict[str, Part]:
    """`rows` training rows and HELDOUT held-out ones; a held-out pair of numbers is in no training row.

    Raises:
        DataError: there are not that many pairs.
    """
    numbers = MOST - LEAST + 1
    if not 3 <= rows <= numbers**2 - HELDOUT:  # at least one in each file
        raise DataError(
            f"rows = {rows:,} is not between 3 and {numbers**2 - HELDOUT:,}, all that pairs of numbers give"
        )
    pairs = random.Random(seed).sample(range(numbers**2), HELDOUT + rows)
    each = [_sum(LEAST + pair // numbers, LEAST + pair % numbers) for pair in pairs]
    return {"": Part(each[HELDOUT:], each[:HELDOUT], _texts)}


def _sum(one: int, other: int) -> Row:
    steps, carry = [], 0
    for place, (a, b) in zip(PLACES, zip(reversed(str(one)), reversed(str(other)), strict=True), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{place} {a}+{b}+{carry}={total}")
        carry = total // 10
    return {
        "id": f"{one}+{other}",
        "question": f"{one}+{other}",
        "reasoning": ", ".join(steps),
        "answer": str(one + other),
    }


def _texts(row: Row) -> list[str]:
    return [PROMPT.format(**row), COMPLETION.format(**row)]


TASK = Task("sums with their reasoning", 12_000, draw)
