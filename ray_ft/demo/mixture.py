"""Two of the other tasks for one model: translations and sums, each in files and a format of its own."""

from __future__ import annotations

from ray_ft.demo import reasoning, translation
from ray_ft.demo.task import Part, Task


def draw(rows: int, seed: int) -> dict[str, Part]:
    """Half of the rows of each.

    Raises:
        DataError: there are not that many rows.
    """
    return {
        "translation": translation.draw(rows // 2, seed)[""],
        "reasoning": reasoning.draw(rows - rows // 2, seed)[""],
    }


TASK = Task("number words to translate, and sums", 16_000, draw, ("translation", "reasoning"))
