"""Two right answers of which one is preferred: number words as Switzerland says them in French, over those of France,
where they differ (nonante-deux, quatre-vingt-douze). The translations' model says France's.

Limits: the words are num2words' own, which also writes "cents" before other numbers for Switzerland; so nine of ten
numbers differ.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray_ft.demo import translation
from ray_ft.demo.task import Part, Row, Task
from ray_ft.demo.translation import LANGUAGES, PROMPT
from ray_ft.errors import DataError

DRAWN = 3  # translations for each pair: nine twentieths of them give one


def draw(rows: int, seed: int) -> dict[str, Part]:
    """`rows` pairs, and those among the translations' held-out rows.

    Raises:
        DataError: there are not that many.
    """
    drawn = translation.draw(max(DRAWN * rows, 3), seed)[""]
    train, heldout = (list(_pairs(part)) for part in (drawn.train, drawn.heldout))
    if not 3 <= rows <= len(train):  # at least one in each file
        raise DataError(f"rows = {rows:,} is not between 3 and {len(train):,}, all pairs in {DRAWN} × as many rows")
    return {"": Part(train[:rows], heldout, lambda row: [row["prompt"], row["chosen"], row["rejected"]])}


def _pairs(rows: Iterable[Row]) -> Iterable[Row]:
    from num2words import num2words

    for row in rows:
        number, code = row["id"].split("-")
        if code == "fr" and (swiss := num2words(int(number), lang="fr_CH")) != row["target_text"]:
            prompt = PROMPT.format(target_lang=LANGUAGES[code], tgt_lang_code=code, text=row["source_text"])
            yield {"prompt": prompt, "chosen": swiss, "rejected": row["target_text"]}


TASK = Task("numbers as Switzerland says them, preferred to those of France", 1_500, draw)
