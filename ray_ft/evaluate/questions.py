"""Held-out rows as questions: a seeded sample of them, each with where it is from and which languages it speaks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ft import paths
from ray_ft.answers.target import Prompt
from ray_ft.data import sources
from ray_ft.data.files import public_name
from ray_ft.data.formats import columns_used
from ray_ft.data.images import ImageReader, data_url
from ray_ft.data.lines import Reject
from ray_ft.data.render import load_tokenizer, special_tokens
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Asked, Conversation, Joined, Labelled, preferred
from ray_ft.data.thinking import split
from ray_ft.errors import DataError
from ray_ft.recipe import Recipe, Source, Thinking, TranslationSource


@dataclass(frozen=True)
class Question:
    """A held-out row to be answered: where it is from, the sample, and the answer that it holds (of two the preferred).

    Attributes:
        origin: ``file:line``.
        source: which of the recipe's held-out sources: "data.eval.0 (heldout.parquet)".
        languages: codes of the language translated from and into, where the source has them.
    """

    origin: str
    sample: Asked
    source: str = ""
    languages: tuple[str, str] | None = None

    @property
    def reference(self) -> str:
        """The row's answer, with what it thinks."""
        return self.sample.answer

    @property
    def said(self) -> str:
        """The row's answer without what it thinks: what answers are compared with."""
        return split(self.reference, self.thinking)[1]

    @property
    def thinking(self) -> Thinking | None:
        """How thinking is marked in the answers to it, where they may think."""
        return self.sample.thinking

    @property
    def pair(self) -> str | None:
        """Such as "en-fr"."""
        return "-".join(self.languages) if self.languages else None

    @property
    def target_language(self) -> str | None:
        return self.languages[1] if self.languages else None

    @property
    def prompt(self) -> Prompt:
        """What the model is asked: a conversation, or text as it is."""
        if isinstance(self.sample, Joined):
            return Prompt(text=self.sample.prompt)
        files = iter(self.sample.images)
        return Prompt(messages=[{**turn, "content": _asked(turn["content"], files)} for turn in self.sample.prompt])

    @property
    def asked(self) -> list[dict[str, Any]] | str:
        """The prompt as reports show it: messages, or text; of images, where they stood."""
        if isinstance(self.sample, Joined):
            return self.sample.prompt
        return [{**turn, "content": _shown(turn["content"])} for turn in self.sample.prompt]


def _asked(content: str | list[dict[str, Any]], files: Iterator[bytes]) -> str | list[dict[str, Any]]:
    """A turn's content as OpenAI's API takes it."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": data_url(next(files))}} if part["type"] == "image" else part
        for part in content
    ]


def _shown(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return " ".join("[image]" if part["type"] == "image" else part["text"] for part in content)


def held_out_questions(recipe: Recipe, count: int) -> list[Question]:
    """A seeded sample of the usable held-out rows, in their order; the same for everyone who asks.

    Plain text asks nothing, so its rows are not among them.

    Raises:
        DataError: the recipe names no held-out data.
    """
    if not recipe.data.eval:
        raise no_held_out()
    chosen: list[tuple[int, Question]] = []
    generator = random.Random(recipe.run.seed)
    for seen, question in enumerate(_questions(recipe)):  # reservoir sampling: one pass, bounded memory
        if seen < count:
            chosen.append((seen, question))
        elif (at := generator.randrange(seen + 1)) < count:
            chosen[at] = (seen, question)
    return [question for _, question in sorted(chosen, key=lambda pair: pair[0])]


def no_held_out() -> DataError:
    return DataError(
        "the recipe has no data.eval, so there is nothing to evaluate on",
        [
            "name held-out sources there; of a run, then train again: a finished one only prepares them",
            "evaluate a run's export with another recipe: ray-ft evaluate RUN/export --recipe RECIPE",
        ],
    )


def _questions(recipe: Recipe) -> Iterable[Question]:
    special = special_tokens(load_tokenizer(recipe.model.folder(weights=False)))
    for number, source in enumerate(recipe.data.eval):
        named = source_name(number, source)
        for file in sources.find_files(source):
            before = 0
            images = ImageReader.of(file, recipe.data.images)
            for chunk in sources.chunks_of(file, number):
                line = 0
                for row in sources.read_rows(chunk, columns_used(source)):
                    line = row.line
                    content = row.content
                    made = to_sample(source, content, special, images=images) if isinstance(content, dict) else None
                    sample = None if made is None or isinstance(made, Reject | Labelled) else preferred(made)
                    if isinstance(sample, Conversation) or (isinstance(sample, Joined) and sample.prompt):
                        assert isinstance(row.content, dict)
                        languages = _languages(source, row.content)
                        yield Question(f"{file.name}:{before + line}", sample, named, languages)
                before += line if file.kind == "jsonl" else 0


def source_name(number: int, source: Source) -> str:
    """A held-out source for people: "data.eval.0 (heldout.parquet)"."""
    return f"data.eval.{number} ({', '.join(_name(path) for path in source.path)})"


def _name(path: str) -> str:
    return paths.base_name(public_name(path).rstrip("/"))


def _languages(source: Source, row: dict[str, Any]) -> tuple[str, str] | None:
    """Of a row that the source's format accepts."""
    if not isinstance(source, TranslationSource):
        return None
    return (
        source.source_lang_code or row[source.source_lang_code_field],
        source.target_lang_code or row[source.target_lang_code_field],
    )


def groups(questions: Sequence[Question]) -> dict[str, dict[str, list[int]]]:
    """Kind of group → its name → numbers of the questions in it: by language pair and by source, sorted by name."""
    found: dict[str, dict[str, list[int]]] = {"language_pair": {}, "source": {}}
    for number, question in enumerate(questions):
        if question.pair:
            found["language_pair"].setdefault(question.pair, []).append(number)
        if question.source:
            found["source"].setdefault(question.source, []).append(number)
    return {kind: dict(sorted(members.items())) for kind, members in found.items()}
