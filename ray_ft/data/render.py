"""Samples to tokens: the chat template, and which tokens are trained.

A conversation is rendered once as a whole and once up to each assistant turn; what the longer text has more is that
turn's answer. Tokens that hold any of an answer are trained, up to and including the marker that ends the turn, so
that the model learns to stop; so is one that joins the prompt's last space to the answer's first word. Thinking that
is not to be trained leaves the answer with both of its tags; a token that joins the close tag's end to what follows
holds some of what follows. The rendered text holds every special token (Gemma's template writes ``<bos>`` itself), so
it is tokenized without adding any. Where the template marks an image stand the tokens that the model's processor puts
there; none of them is ever a target.

A labelled text is tokenized as a served classifier does it, special tokens added, and its label stands behind it as one
more token, the only one that is trained: what the model is to say next. It is a number among the labels, not a word; no
other token sees it, and the model's state there is not used.
"""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ft import hub
from ray_ft.data import thinking
from ray_ft.data.lines import Reject
from ray_ft.data.samples import Asked, Conversation, Joined, Labelled, Pair, Sample, preferred
from ray_ft.data.surfaces import Held, surfaces_of
from ray_ft.data.template import ChatTemplate, TemplateRefusal
from ray_ft.data.vision import Vision
from ray_ft.errors import ModelError
from ray_ft.lean import without_unused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ENCODE_CHARACTERS = 4 << 20  # of text tokenized at once: its tokens take 200 to 350 bytes of memory per character
MANY = 64  # texts for which the bytes of a whole vocabulary are looked up, which takes up to half a second
VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.*")  # one of them is in any tokenizer


@dataclass(frozen=True)
class Tokens:
    """One sample. `ids` int32 [n]; `trained` bool [n], True where the token is a target of the loss.

    `whole` is False where these are the first tokens alone of a text that is far too long. The last `kept` tokens stay
    where it is cut: a label, and what a tokenizer puts behind every text. Of a pair these are two documents, prompt and
    chosen answer, then prompt and rejected answer, which begins at `rejected_at`. `images` are the files of the images,
    in the order of their tokens, and `soft`, bool [n], says which tokens an image's embeddings replace.
    """

    ids: np.ndarray
    trained: np.ndarray
    whole: bool = True
    kept: int = 0
    rejected_at: int | None = None
    images: tuple[bytes, ...] = ()
    soft: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> Tokens:
        """The first tokens, and those that are kept, together `length`."""
        last = len(self) - self.kept
        index = np.r_[0 : max(length - self.kept, 0), last : len(self)]
        return Tokens(self.ids[index], self.trained[index], whole=self.whole, kept=self.kept)


class Renderer:
    """Turns samples into tokens with one model's tokenizer and chat template.

    Args:
        enough: a text that certainly gives more tokens than this is tokenized only so far that it still does: a row of
            20 MB would otherwise take a minute and 6 GB (seen), to be left out or cut afterwards.
        vision: what stands for images; None: samples have none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, enough: int | None = None, vision: Vision | None = None
    ) -> None:
        self.tokenizer, self.vision = tokenizer, vision
        # Twice what is needed at the least, so that a word cut in two lies far behind the last token that is wanted.
        self.tokens = None if enough is None else 2 * (enough + 1)
        self.characters = None if self.tokens is None else self.tokens * _longest_token(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.special = special_tokens(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self._counting = False  # whether this data's texts mostly need offsets

    def prompt_text(self, sample: Asked) -> str:
        """What the model is given when it is to answer the sample: exactly the text before the trained answer."""
        sample = preferred(sample)
        if isinstance(sample, Joined):
            return (self.tokenizer.bos_token or "") + sample.prompt
        return self._render(sample.prompt, answer_next=True)

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end of text, and what the chat template puts behind the assistant's turn."""
        found = set() if self.eos is None else {self.eos}
        if self.tokenizer.chat_template:
            turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
            tokens = self.encode([Conversation(turns)])[0]
            if isinstance(tokens, Tokens):
                last = int(tokens.ids[tokens.trained][-1])
                if last in self.tokenizer.all_special_ids or last in self.tokenizer.added_tokens_decoder:
                    found.add(last)
        return sorted(found)

    def encode(self, samples: Sequence[Sample]) -> list[Tokens | Reject]:
        """Tokenize many samples at once, all with a label or none.

        A Reject where the template refuses one, or makes two answers alike.
        """
        documents = [one for sample in samples for one in _documents(sample)]
        found = iter(self._encode_documents(documents))
        return [paired(next(found), next(found)) if isinstance(one, Pair) else next(found) for one in samples]

    def _encode_documents(self, samples: Sequence[Asked | Labelled]) -> list[Tokens | Reject]:
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []  # characters of each text that are answers
        results: list[Tokens | Reject | None] = []
        for sample in samples:
            try:
                text, answers = self._with_spans(sample)
            except TemplateRefusal as refusal:
                results.append(Reject("refused by the chat template", str(refusal)))
                continue
            texts.append(text)
            spans.append(answers)
            results.append(None)
        rendered = [sample for sample, result in zip(samples, results, strict=True) if result is None]
        tokens = iter([tokens for part in self._parts(texts) for tokens in self._encode(part, texts, spans, rendered)])
        return [next(tokens) if result is None else result for result in results]

    def _parts(self, texts: list[str]) -> Iterator[slice]:
        """The texts in runs of about ENCODE_CHARACTERS."""
        start = size = 0
        for at, text in enumerate(texts):
            size += min(len(text), self.characters or len(text))
            if size >= ENCODE_CHARACTERS or at == len(texts) - 1:
                yield slice(start, at + 1)
                start, size = at + 1, 0

    def _encode(
        self, part: slice, texts: list[str], spans: list[list[tuple[int, int]]], samples: list[Asked | Labelled]
    ) -> Iterator[Tokens | Reject]:
        tokenizer = self.tokenizer.backend_tokenizer
        begun = [text[: self.characters] for text in texts[part]]
        added = isinstance(samples[part][0], Labelled)
        surfaces = surfaces_of(self.tokenizer) if len(begun) >= MANY and not (added or self._counting) else None
        encode = tokenizer.encode_batch_fast if surfaces else tokenizer.encode_batch
        encodings = encode(begun, add_special_tokens=added)
        unplaced = 0
        for encoding, text, answers, sample in zip(encodings, texts[part], spans[part], samples[part], strict=True):
            end = self.characters or len(text)
            while end < len(text) and len(encoding) < (self.tokens or 0):  # some tokenizers leave out white space
                end *= 2
                encoding = tokenizer.encode(text[:end], add_special_tokens=added)
            whole = end >= len(text)
            if isinstance(sample, Labelled):
                yield self._labelled(encoding, sample.label, whole)
                continue
            ids = np.asarray(encoding.ids, dtype=np.int32)
            placed = surfaces.place(ids, text[:end]) if surfaces else None
            if placed is None and surfaces:
                unplaced += 1
                encoding = tokenizer.encode(text[:end], add_special_tokens=added)  # with offsets
                ids = np.asarray(encoding.ids, dtype=np.int32)  # a tokenizer with dropout draws others
            tokens = self._tokens(ids, placed.held if placed else partial(_held, encoding), answers, sample)
            yield tokens if whole else replace(tokens, whole=False)
        self._counting = self._counting or 2 * unplaced > len(encodings)

    def _with_spans(self, sample: Asked | Labelled) -> tuple[str, list[tuple[int, int]]]:
        if isinstance(sample, Labelled):
            return sample.text, []
        if isinstance(sample, Joined):
            text = sample.prompt + sample.answer
            return text, _trained(text, len(sample.prompt), len(text), sample)
        text = self._render(sample.turns)
        if sample.images:
            assert self.vision is not None
            if (found := text.count(self.vision.tokens)) != len(sample.images):
                raise TemplateRefusal(f"it renders {found} of {len(sample.images)} images")
        spans = []
        for at, turn in enumerate(sample.turns):
            if turn["role"] != "assistant" or at < sample.first:
                continue
            start = len(before := self._render(sample.turns[:at], answer_next=True))
            through = text if at == len(sample.turns) - 1 else self._render(sample.turns[: at + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise TemplateRefusal("it renders a turn differently once later turns follow, so no loss mask exists")
            # White space behind the end-of-turn marker belongs to the layout, not to the answer.
            end = len(through.rstrip())
            tags = sample.thinking
            if tags and tags.close in turn["content"] and tags.close not in text[start:end]:
                raise TemplateRefusal(f"it leaves out what an answer thinks (up to {tags.close})")
            spans += _trained(text, start, end, sample)
        return text, spans

    @staticmethod
    def _labelled(encoding: Any, label: int, whole: bool) -> Tokens | Reject:
        own = np.flatnonzero(np.asarray(encoding.special_tokens_mask, dtype=np.int8) == 0)
        if not len(own):
            return Reject("no token in the text", "the tokenizer leaves out all its characters")
        ids = np.append(np.asarray(encoding.ids, dtype=np.int32), np.int32(label))
        return Tokens(ids, np.arange(len(ids)) == len(ids) - 1, whole=whole, kept=len(ids) - int(own[-1]) - 1)

    def _tokens(self, ids: np.ndarray, held: Held, spans: list[tuple[int, int]], sample: Asked) -> Tokens:
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            trained[held(start, end)] = True
        if isinstance(sample, Joined):
            if self.bos is not None and (not len(ids) or ids[0] != self.bos):
                ids, trained = np.insert(ids, 0, self.bos), np.insert(trained, 0, False)
            if self.eos is not None:
                ids, trained = np.append(ids, np.int32(self.eos)), np.append(trained, True)
        trained[:1] = False  # nothing stands before the first token that could predict it
        if isinstance(sample, Joined) or not sample.images:
            return Tokens(ids, trained)
        assert self.vision is not None
        soft = ids == self.vision.token_id
        return Tokens(ids, trained & ~soft, images=sample.images, soft=soft)

    def _render(self, turns: Sequence[dict[str, Any]], answer_next: bool = False) -> str:
        rendered = self._template.render(turns, answer_next)
        # No text of a row holds the mark: it is a special token, and such rows are rejected.
        return rendered if self.vision is None else rendered.replace(self.vision.mark, self.vision.tokens)


def _documents(sample: Sample) -> tuple[Asked | Labelled, ...]:
    return (sample.chosen, sample.rejected) if isinstance(sample, Pair) else (sample,)


def paired(chosen: Tokens | Reject, rejected: Tokens | Reject) -> Tokens | Reject:
    """Both documents of a pair as one sample."""
    if isinstance(chosen, Reject):
        return chosen
    if isinstance(rejected, Reject):
        return rejected
    whole = chosen.whole and rejected.whole
    if whole and np.array_equal(chosen.ids, rejected.ids):  # such as answers that differ in white space alone
        return Reject("chosen and rejected are the same", "once they are rendered")
    ids, trained = (np.concatenate((a, b)) for a, b in ((chosen.ids, rejected.ids), (chosen.trained, rejected.trained)))
    return Tokens(ids, trained, whole=whole, rejected_at=len(chosen))


def _held(encoding: Any, start: int, end: int) -> slice:
    """Tokens that hold any of the characters [start, end), and those between them that hold none.

    Tokens stand in the order of their characters, so both ends are found by bisection: to ask for the place of every
    token makes a tuple of each, and takes a fifth of the time that the tokenizer does (seen).
    """
    place = encoding.token_to_chars  # of a token: (its first character, the one behind its last)

    def reached(token: int) -> bool:
        first, behind = place(token)
        return first >= start or behind > start

    tokens = range(len(encoding))
    begin = bisect_left(tokens, True, key=reached)
    return slice(begin, bisect_left(tokens, True, lo=begin, key=lambda token: place(token)[0] >= end))


def _trained(text: str, start: int, end: int, sample: Asked) -> list[tuple[int, int]]:
    """Which characters of an answer at text[start:end] are trained."""
    if sample.thinking is None or sample.thinking.train:
        return [(start, end)]
    return thinking.said(text, start, end, sample.thinking)


@lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters that one token stands for, at most."""
    return max(map(len, tokenizer.get_vocab()))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the text of any special token, which the tokenizer takes for the token wherever it stands.

    Added tokens that are not special (``<think>`` in some models) are ordinary text under one number.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    words = {token.content for token in added if token.single_word}
    tokens = {token.content for token in added} | set(tokenizer.all_special_tokens)
    patterns = [
        rf"(?<!\w){re.escape(token)}(?!\w)" if token in words else re.escape(token)
        for token in sorted(filter(None, tokens), key=lambda token: (-len(token), token))  # the longest that fits
    ]
    return re.compile("|".join(patterns)) if patterns else None


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a local model folder, kept per process until a file of the folder changes.

    Raises:
        ModelError: the folder holds no usable fast tokenizer.
    """
    return _loaded(folder, _stamps(folder))


def _stamps(folder: str) -> tuple[tuple[str, int, int], ...]:
    """(Name, bytes, time of the last change) of its files; nothing where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            files = [(one.name, one.stat()) for one in found if one.is_file()]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


@lru_cache(maxsize=4)
def _loaded(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> PreTrainedTokenizerBase:
    without_unused()
    from transformers import AutoTokenizer

    try:
        # Where there is none, transformers 5 makes one of five tokens, from the model type in config.json.
        if not any(glob.glob(os.path.join(glob.escape(folder), name)) for name in VOCABULARIES):
            raise OSError(f"it holds none of {', '.join(VOCABULARIES)}")
        # Said, as transformers would else ask on the terminal whether a folder's own code may run.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=hub.runs_code(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.path {folder!r} has no usable tokenizer: {str(error).splitlines()[0]}",
            ["copy tokenizer.json and tokenizer_config.json of the model into the folder"],
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {folder!r} is a slow one ({type(tokenizer).__name__}); character offsets are needed",
            ["add a tokenizer.json: AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(folder)"],
        )
    # tokenizer.json may ask for both, and rows would be cut, or padded to their neighbours' length, without a word.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
