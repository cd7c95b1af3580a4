"""A row to a sample, or to the reason why it is none: by the recipe's formats, nothing altered silently."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ray_ft.data import thinking
from ray_ft.data.formats import READERS
from ray_ft.data.images import BadImage, ImageReader
from ray_ft.data.lines import Reject
from ray_ft.data.samples import Asked, Conversation, Labelled, Pair, Sample, text_of
from ray_ft.data.values import Unusable, label_in, text_in
from ray_ft.recipe import AnswerSource, LabelsSource, Source, TemplateSource, Thinking, TranslationSource


def to_sample(
    source: Source,
    row: dict[str, Any],
    special: re.Pattern[str] | None = None,
    *,
    labels: Sequence[str] = (),
    images: ImageReader | None = None,
) -> Sample | Reject:
    """What the source's format makes of one row.

    Args:
        labels: `model.labels`, which rows of format labels name.
        images: reads the images that the row names; None: rows with images are rejected.
        special: finds the tokenizer's special tokens (`Renderer.special`). A row that holds the text of one is
            rejected: the tokenizer would make the token itself of it, so that a quoted ``<end_of_turn>`` ends the
            turn. Those that the recipe's own templates hold are meant.
    """
    try:
        if isinstance(source, LabelsSource):
            sample: Sample = Labelled(text_in(row, source.field), label_in(row, source.label_field, labels))
        else:
            sample = READERS[type(source)](source, row)
        if special:
            _check_special(source, sample, special)
        if isinstance(source, AnswerSource) and source.thinking:
            assert isinstance(sample, Asked)
            sample = _thinking(sample, source.thinking)
        return _with_images(sample, images)
    except Unusable as unusable:
        return unusable.reject


def _with_images(sample: Sample, images: ImageReader | None) -> Sample:
    """The sample with what its readers left in place of images read, last of all: it takes longest."""
    if isinstance(sample, Pair):
        answers = [one for one in (sample.chosen, sample.rejected) if isinstance(one, Conversation)]
        if any(isinstance(turn["content"], list) for one in answers for turn in one.turns):
            raise Unusable("pair with an image", "preferences are learnt from text alone")
    if not isinstance(sample, Conversation) or all(isinstance(turn["content"], str) for turn in sample.turns):
        return sample
    turns, files = [], list[bytes]()
    for number, turn in enumerate(sample.turns):
        if isinstance(turn["content"], list):
            if images is None:
                raise Unusable("row with an image", f"message {number}; data.images is null")
            try:
                files += [images.read(part["image"]) for part in turn["content"] if part["type"] == "image"]
            except BadImage as bad:
                raise Unusable(bad.reason, bad.detail) from None
            parts = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
            turn = {**turn, "content": parts}
        turns.append(turn)
    return replace(sample, turns=tuple(turns), images=tuple(files))


def _thinking(sample: Asked, tags: Thinking) -> Asked:
    for number, answer in enumerate(sample.answers):
        if found := thinking.fault(answer, tags):
            reason, detail = found
            raise Unusable(reason, f"{detail}, in answer {number}" if len(sample.answers) > 1 else detail)
    return replace(sample, thinking=tags)


def _check_special(source: Source, sample: Sample, special: re.Pattern[str]) -> None:
    # Of the texts as they are joined: the token may come about where two of them meet.
    if isinstance(sample, Pair):
        _check_special(source, sample.chosen, special)
        _check_special(source, sample.rejected, special)
        return
    if isinstance(sample, Conversation):
        texts = [text_of(turn["content"]) for turn in sample.turns]
    elif isinstance(sample, Labelled):
        texts = [sample.text]
    else:
        texts = [sample.prompt + sample.answer]
    if not any(map(special.search, texts)):
        return
    meant = Counter(token for text in _literals(source) for token in special.findall(text))
    for text in texts:
        for match in special.finditer(text):
            if meant[match[0]]:
                meant[match[0]] -= 1
                continue
            around = text[max(match.start() - 20, 0) : match.end() + 20]
            raise Unusable(f"holds the special token {match[0]!r}", f"the model would obey it: {around!r}")


def _literals(source: Source) -> Iterator[str]:
    """What the recipe itself writes into the samples of a source."""
    if isinstance(source, TranslationSource | TemplateSource):
        templates = [source.prompt, *([source.completion] if isinstance(source, TemplateSource) else [])]
        yield from (text for template in templates for text, *_ in string.Formatter().parse(template))
