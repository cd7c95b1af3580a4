"""Conversations for `ingest.py`: any number of bytes in seconds, each row another, all drawn from one seed.

Limits: the words are those of numbers, which the demo's tokenizer has as one token each. A block of rows is drawn once
and written again and again, every time with another number in each of its rows.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_ft.demo import DemoPaths, write_demo

BLOCK_ROWS = 4096
MARK = "########"  # where the number of the block stands: always as many digits, so as many tokens
SEQ_LEN = 1024  # every row fits, so that nothing is cut or left out on either side
#: Words of a turn, at most, by the kind of rows: conversations like those of instruction data, or one short sentence.
KINDS = {"conversations": 160, "sentences": 8}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of "500MB".

    Raises:
        ValueError: it is no number with a unit.
    """
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS:
        raise ValueError(f"{text!r} is no size such as 50MB or 5GB")
    return int(float(number) * UNITS[unit])


def demo(folder: str) -> DemoPaths:
    """The model whose tokenizer and template are used."""
    return write_demo(folder)


def block(kind: str, words: Sequence[str], seed: int = 0) -> bytes:
    """The rows that are written again and again: two turns or four, whose lengths are spread evenly."""
    rng, longest = random.Random(seed), KINDS[kind]
    rows = []
    for number in range(BLOCK_ROWS):
        turns = [
            {"role": ("user", "assistant")[at % 2], "content": " ".join(rng.choices(words, k=rng.randint(2, longest)))}
            for at in range(2 if kind == "sentences" else rng.choice((2, 2, 4)))
        ]
        turns[0]["content"] = f"{MARK} {number:04d} {turns[0]['content']}"
        rows.append(json.dumps({"messages": turns}) + "\n")
    return "".join(rows).encode()


def write(file: Path, kind: str, least: int, words: Sequence[str]) -> None:
    """Write at least so many bytes of whole rows. Exits where the disk has no room for them and their packed rows."""
    needed, free = 2 * least, shutil.disk_usage(file.parent).free
    if free < needed:
        sys.exit(
            f"{file.parent} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed: set TMPDIR, or --sizes"
        )
    rows, written, number = block(kind, words), 0, 0
    with open(file, "wb") as out:
        while written < least:
            part = rows.replace(MARK.encode(), f"{number:0{len(MARK)}d}".encode())
            if len(part) > least - written:  # the last: whole rows until it is enough
                part = part[: part.index(b"\n", least - written - 1) + 1]
            written += out.write(part)
            number += 1


def words() -> list[str]:
    """English number words, as the demo's tokenizer has learnt them."""
    from num2words import num2words

    return sorted({word for number in range(1000, 10_000, 7) for word in num2words(number).replace("-", " ").split()})
