"""Rows that equal an earlier row, counted over a whole split, and used: only the person knows whether they are meant.

Rows are compared by 8-byte hashes of their tokens and images, so 100 million rows take 0.8 GB while they are counted.
That one of those is taken for a duplicate that is none has probability n² / 2⁶⁵ (birthday bound): 0.03% for that many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ray_ft.data.render import Tokens


def row_hash(tokens: Tokens) -> bytes:
    """8 bytes that tell samples apart which are trained on differently."""
    digest = hashlib.blake2b(tokens.ids.tobytes(), digest_size=8)
    digest.update(tokens.trained.tobytes())
    for image in tokens.images:
        digest.update(hashlib.blake2b(image).digest())
    return digest.digest()


def count(hashes: Sequence[bytes]) -> int:
    """How many rows equal an earlier one; `hashes` holds those of any number of rows, joined, in each item."""
    rows = np.frombuffer(b"".join(hashes), np.uint64)
    return len(rows) - len(np.unique(rows))
