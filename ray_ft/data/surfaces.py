"""Which characters of a text each of its tokens stands for, found from the tokens' own bytes.

A tokenizer that counts characters along (offsets) takes a third longer. The bytes of the tokens, one behind the other,
are the text again with any byte-level tokenizer (GPT-2's, Llama 3's, Qwen's) and with SentencePiece's BPE as Gemma's;
then where a token begins is a sum of lengths. Each text is compared: one that its tokens do not spell is `None` here,
and the tokenizer has to count. That is so where it changes the text first (Unicode normal forms, letters made small, a
space put before the first word) or has no token for a character.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a b"

Held = Callable[[int, int], slice]
"""Of characters [start, end): the tokens that hold any of them."""


class Surfaces:
    """The bytes that each token of one tokenizer stands for.

    Args:
        bytes_of: of each token, by its number.
    """

    def __init__(self, bytes_of: list[bytes]) -> None:
        self._bytes_of = np.array(bytes_of, dtype=object)
        self._lengths = np.fromiter(map(len, bytes_of), dtype=np.int32, count=len(bytes_of))

    def place(self, ids: np.ndarray, text: str) -> Placed | None:
        """Where the tokens (int32 [n]) stand in the text; None where they do not spell it."""
        content = text.encode()
        if b"".join(self._bytes_of[ids].tolist()) != content:
            return None
        lengths = self._lengths[ids]
        return Placed(text, lengths.cumsum(dtype=np.int32), lengths, ascii_only=len(content) == len(text))


class Placed:
    """Tokens that spell a text.

    Args:
        ends: int [n], the byte behind each token.
        lengths: int [n], its bytes.
    """

    def __init__(self, text: str, ends: np.ndarray, lengths: np.ndarray, ascii_only: bool) -> None:
        self._text, self._ends, self._starts, self._ascii_only = text, ends, ends - lengths, ascii_only

    def held(self, start: int, end: int) -> slice:
        """Tokens that hold a byte of the characters [start, end), and those between them that hold none."""
        first, behind = self._byte(start), self._byte(end)
        begin = min(self._starts.searchsorted(first), self._ends.searchsorted(first, side="right"))
        return slice(int(begin), max(int(begin), int(self._starts.searchsorted(behind))))

    def _byte(self, character: int) -> int:
        return character if self._ascii_only else len(self._text[:character].encode())


@lru_cache(maxsize=4)
def surfaces_of(tokenizer: PreTrainedTokenizerBase) -> Surfaces | None:
    """None where no known way leads from the tokens of this tokenizer to bytes."""
    backend = tokenizer.backend_tokenizer
    if backend.post_processor is not None and b'"trim_offsets":true' in backend.post_processor.__getstate__():
        return None  # its offsets leave spaces out, so the two ways would train other tokens
    vocabulary = backend.get_vocab(with_added_tokens=False)
    known = set(vocabulary.values())
    # Gemma's runs of spaces (▁▁) are both: in a text they are the vocabulary's.
    added = {
        number: token.content.encode()
        for number, token in backend.get_added_tokens_decoder().items()
        if token.special or number not in known
    }
    size = max([*vocabulary.values(), *added], default=-1) + 1
    probe = np.asarray(backend.encode(PROBE, add_special_tokens=False).ids, dtype=np.int32)
    for way in (_byte_level, _sentencepiece):
        bytes_of = [b""] * size
        for token, number in vocabulary.items():
            bytes_of[number] = way(token)
        for number, content in added.items():
            bytes_of[number] = content
        found = Surfaces(bytes_of)
        if found.place(probe, PROBE) is not None:
            return found
    return None


def _byte_level(token: str) -> bytes:
    """Of GPT-2's alphabet, which writes each byte as one printable character; others stand for themselves."""
    letters = _alphabet()
    return b"".join(letters.get(letter) or letter.encode() for letter in token)


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, bytes]:
    """Printable bytes of Latin-1 are their own character, the others in ascending order those from U+0100 on
    (the order in which GPT-2's encoder gives them away)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [number for number in range(256) if number not in own]
    pairs = [(number, number) for number in own] + [(number, 256 + at) for at, number in enumerate(others)]
    return {chr(letter): bytes((number,)) for number, letter in pairs}


def _sentencepiece(token: str) -> bytes:
    """A space is written ▁, and a byte that no other token holds ``<0xE6>``."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes((int(token[3:5], 16),))
    return token.replace("▁", " ").encode()
