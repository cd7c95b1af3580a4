"""Number words from English into French and Spanish.

Limits: the words are num2words' own, which inflects less than people do ("veintiuno mil").
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from ray_ft.demo.task import HELDOUT, Part, Row, Task
from ray_ft.errors import DataError

LANGUAGES = {"fr": "French", "es": "Spanish"}
"""Target languages: code → name. The source is English."""

PROMPT = "Translate to {target_lang} ({tgt_lang_code}): {text}"
"""Prompt template of the quickstart's recipe; the tokenizer learns its words too."""

LARGEST, SMALL, SMALL_SHARE = 99_999, 1_000, 0.15  # share of numbers below 1,000, which people type first


def draw(rows: int, seed: int) -> dict[str, Part]:
    """`rows` training rows, as many into each language, and HELDOUT × languages held-out ones; a held-out number is in
    no training row.

    Raises:
        DataError: there are not that many rows.
    """
    rng = random.Random(seed)
    small, large = (rng.sample(numbers, len(numbers)) for numbers in (range(SMALL), range(SMALL, LARGEST + 1)))

    def some(count: int) -> Iterable[Row]:
        few = min(round(count * SMALL_SHARE), len(small))
        for number in [small.pop() for _ in range(few)] + [large.pop() for _ in range(count - few)]:
            yield from _translations(number)

    heldout = list(some(HELDOUT))
    most = len(LANGUAGES) * (len(small) + len(large))
    if not 3 <= rows <= most:  # at least one in each file
        raise DataError(f"rows = {rows:,} is not between 3 and {most:,}, all that numbers up to {LARGEST:,} give")
    train = list(some(-(-rows // len(LANGUAGES))))[:rows]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return {"": Part(train, heldout, _texts)}


def _translations(number: int) -> Iterable[Row]:
    from num2words import num2words

    for code in LANGUAGES:
        yield {
            "id": f"{number}-{code}",
            "source_text": num2words(number, lang="en"),
            "target_text": num2words(number, lang=code),
            "source_lang_code": "en",
            "target_lang_code": code,
        }


def _texts(row: Row) -> list[str]:
    code = row["target_lang_code"]
    return [PROMPT.format(target_lang=LANGUAGES[code], tgt_lang_code=code, text=row["source_text"]), row["target_text"]]


TASK = Task("number words to translate", 12_000, draw)
