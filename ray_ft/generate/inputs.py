"""Rows to be answered: each with its place, as it was written, and what is asked by it.

Formats are those of recipes, of which only the prompt's side has to be there; answers that rows already hold are not
shown to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from ray_ft import paths
from ray_ft.answers import Prompt
from ray_ft.data.files import File, find_files
from ray_ft.data.formats import columns_used
from ray_ft.data.lines import Reject, parse_line, read_lines
from ray_ft.data.parquet import parquet_columns, read_groups, row_group_bytes
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Conversation, Labelled, preferred
from ray_ft.errors import DataError
from ray_ft.recipe import (
    MessagesSource,
    PreferenceSource,
    PromptCompletionSource,
    Source,
    TemplateSource,
    TextSource,
    TranslationSource,
    template_fields,
)

#: Stands where a row's answer would: the formats check that there is one, and it is not rendered.
UNKNOWN = "-"

_SOURCES: dict[str, type[Source]] = {
    "messages": MessagesSource,
    "prompt_completion": PromptCompletionSource,
    "translation": TranslationSource,
    "template": TemplateSource,
    "preference": PreferenceSource,
}
FORMATS = (*_SOURCES, "prompt")


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        origin: file:line, or the row's number in a Parquet file.
        raw: the JSON object as it stands in the file; None where there is none, and for Parquet.
        content: the parsed row; empty where it cannot be parsed.
        asked: what the model is asked, or why it cannot be.
    """

    origin: str
    raw: bytes | None
    content: dict[str, Any]
    asked: Prompt | Reject


@dataclass(frozen=True)
class Format:
    """How a row asks. `source` holds the columns' names and templates; `chat`: with the model's chat template."""

    name: str
    source: Source
    chat: bool

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Any], files: Sequence[str]) -> Format:
        """A format by its name; "prompt" is a column (`prompt_field`) given to the model as it is.

        Raises:
            DataError: there is no such format, or its settings are wrong.
        """
        if name not in FORMATS:
            raise DataError(f"format {name!r} is not known", [f"one of {', '.join(FORMATS)}", "leave it out"])
        given: dict[str, Any] = {"path": list(files), **settings}
        if name == "prompt":
            given = {**given, "format": "prompt_completion", "chat": False}
        elif name == "template":
            given = {"completion": UNKNOWN, **given, "format": name}
        else:
            given["format"] = name
        try:
            return cls.from_source(_SOURCES[given["format"]](**given), name)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or name
            raise DataError(
                f"format {name}: {where}: {first['msg']}", ["give the settings of data.train in a recipe, as KEY=VALUE"]
            ) from error

    @classmethod
    def from_source(cls, source: Source, name: str | None = None) -> Format:
        if isinstance(source, TemplateSource):
            source = source.model_copy(update={"completion": UNKNOWN})  # may name columns that only training rows have
        return cls(name or str(source.format), source, getattr(source, "chat", True))  # type: ignore[attr-defined]

    @property
    def columns(self) -> set[str]:
        """Columns without which a row asks nothing."""
        match self.source:
            case PromptCompletionSource():
                return {self.source.prompt_field}
            case TemplateSource():
                return template_fields(self.source.prompt)
            case TranslationSource():
                return columns_used(self.source) - {self.source.target_field}
            case PreferenceSource():
                return {self.source.prompt_field or self.source.chosen_field}
        return columns_used(self.source)

    def prompt(self, row: dict[str, Any], special: re.Pattern[str] | None) -> Prompt | Reject:
        """What the row asks.

        Args:
            special: finds the model's special tokens, which a row must not hold: the model would obey them. A prompt
                that is given as it is may.
        """
        sample = to_sample(self.source, self._completed(row), None if self.name == "prompt" else special)
        if isinstance(sample, Reject):
            return sample
        assert not isinstance(sample, Labelled), "no format here has labels"
        asked = preferred(sample)
        if isinstance(asked, Conversation):
            return Prompt(messages=[dict(turn) for turn in asked.prompt])
        return Prompt(text=asked.prompt)

    def _completed(self, row: dict[str, Any]) -> dict[str, Any]:
        match self.source:
            case PromptCompletionSource():
                return {**row, self.source.completion_field: UNKNOWN}
            case TranslationSource():
                return {**row, self.source.target_field: UNKNOWN}
            case MessagesSource():
                return {**row, self.source.field: _answered(row.get(self.source.field), UNKNOWN)}
            case PreferenceSource(prompt_field=None):
                turns = row.get(self.source.chosen_field)
                chosen, rejected = _answered(turns, UNKNOWN), _answered(turns, 2 * UNKNOWN)
                return {**row, self.source.chosen_field: chosen, self.source.rejected_field: rejected}
            case PreferenceSource():
                return {**row, self.source.chosen_field: UNKNOWN, self.source.rejected_field: 2 * UNKNOWN}
        return row


def _answered(turns: Any, answer: str) -> Any:
    """A list of messages with another last answer; anything else as it is."""
    if not isinstance(turns, list) or not turns:
        return turns
    asked = turns[:-1] if _is_assistants(turns[-1]) else turns
    return [*asked, {"role": "assistant", "content": answer}]


def _is_assistants(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


@dataclass(frozen=True)
class Inputs:
    """The files, in order."""

    files: tuple[File, ...]

    @classmethod
    def of(cls, given: str | Sequence[str]) -> Inputs:
        """Find the files of paths, folders, globs or URIs.

        Raises:
            DataError: there are none, or one is of no known kind.
        """
        locations = [given] if isinstance(given, str) else list(given)
        return cls(tuple(find_files(TextSource(path=locations, format="text"))))

    def stamps(self) -> list[list[Any]]:
        """What identifies their content, as far as a listing can."""
        return [[file.name, file.size, file.stamp] for file in self.files]

    def count(self) -> int:
        """Rows, blank lines aside: one pass over the bytes, nothing parsed.

        Raises:
            DataError: a file is damaged, or not what its name says.
        """
        return sum(self._count(file) for file in self.files)

    def _count(self, file: File) -> int:
        if file.kind == "jsonl":
            return sum(1 for line in read_lines(file, 0, file.size) if isinstance(line, Reject) or line.strip())
        parquet_columns(file)  # for its errors
        fs, path = paths.filesystem(file.uri)
        with fs.open_input_file(path) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)

    def contents(self, skip: int = 0) -> Iterator[tuple[str, bytes | None, dict[str, Any] | Reject]]:
        """(origin, as written, parsed) of each row behind the first `skip`."""
        for file in self.files:
            if file.kind == "parquet":
                groups = len(row_group_bytes(file))
                for number, content in read_groups(file, 0, groups, None) if groups else ():
                    if skip:
                        skip -= 1
                        continue
                    yield f"{file.name}:{number}", None, content
                continue
            for number, line in enumerate(read_lines(file, 0, file.size), start=1):
                if isinstance(line, bytes) and not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                content = line if isinstance(line, Reject) else parse_line(line)
                raw = line.strip() if isinstance(line, bytes) and isinstance(content, dict) else None
                yield f"{file.name}:{number}", raw, content

    def rows(self, form: Format, special: re.Pattern[str] | None, skip: int = 0) -> Iterator[Row]:
        """The rows behind the first `skip`, each with what it asks."""
        for origin, raw, content in self.contents(skip):
            if isinstance(content, Reject):
                yield Row(origin, raw, {}, content)
            else:
                yield Row(origin, raw, content, form.prompt(content, special))

    def recognised(self, candidates: Sequence[Format]) -> Format:
        """The first of some formats whose columns the first row has.

        Raises:
            DataError: it is none of them, or no row can be read.
        """
        first = next((content for _, _, content in self.contents() if isinstance(content, dict)), None)
        if first is None:
            raise DataError(f"{self.files[0].name} holds no row that can be read", ["look at its lines"])
        for form in candidates:
            if form.columns <= first.keys():
                return form
        tried = "; ".join(f"{form.name} ({', '.join(sorted(form.columns))})" for form in candidates)
        raise DataError(
            f"the columns of {self.files[0].name} ({', '.join(map(repr, list(first)[:8]))}) are of no known format: "
            f"{tried}",
            ["name the format and its columns: --format prompt_completion --set prompt_field=COLUMN"],
        )
