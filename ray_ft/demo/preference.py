"""Pairs of a right and a wrong translation of number words: of a number that differs in one digit, or into the other
language."""

from __future__ import annotations

import random

from ray_ft.demo import translation
from ray_ft.demo.task import Part, Row, Task
from ray_ft.demo.translation import LANGUAGES, PROMPT


def draw(rows: int, seed: int) -> dict[str, Part]:
    """The rows of translations, each with a wrong answer.

    Raises:
        DataError: there are not that many rows.
    """
    drawn = translation.draw(rows, seed)[""]
    train, heldout = ([_pair(row, seed) for row in part] for part in (drawn.train, drawn.heldout))
    return {"": Part(train, heldout, lambda row: [row["prompt"], row["chosen"], row["rejected"]])}


def _pair(row: Row, seed: int) -> Row:
    from num2words import num2words

    number, code = row["id"].split("-")
    rng = random.Random(f"{seed} {row['id']}")
    if rng.random() < 0.5:
        at = rng.randrange(len(number))
        others = [digit for digit in "123456789" if digit != number[at]]  # no zero: it may not lead
        wrong, language = number[:at] + rng.choice(others) + number[at + 1 :], code
    else:
        wrong, language = number, next(other for other in LANGUAGES if other != code)
    return {
        "prompt": PROMPT.format(target_lang=LANGUAGES[code], tgt_lang_code=code, text=row["source_text"]),
        "chosen": row["target_text"],
        "rejected": num2words(int(wrong), lang=language),
    }


TASK = Task("right and wrong translations of number words", 2_000, draw)
