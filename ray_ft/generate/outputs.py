"""Answered rows as files: parts that are committed one by one beside the target, put together when all are there.

A part appears under its final name whole or not at all, and its name says how many rows of each kind it holds. Whoever
is killed leaves committed parts, which the same command finds and does not answer again.
"""

from __future__ import annotations

import gzip
import json
import os
import posixpath
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_ft import paths
from ray_ft.answers import Answer
from ray_ft.data.files import COMPRESSIONS, JSONL_SUFFIXES, File
from ray_ft.data.lines import Reject
from ray_ft.errors import DataError
from ray_ft.generate.inputs import Row

STATE = "state.json"
STATE_FORMAT = 1
#: Columns that are added, and their types in Parquet.
ADDED: dict[str, pa.DataType] = {
    "answer": pa.string(),
    "finish_reason": pa.string(),
    "error": pa.string(),
    "tokens": pa.int64(),
}


@dataclass(frozen=True)
class Counts:
    """Rows answered, rejected (they ask nothing) and failed (the model gave no answer), and tokens generated."""

    answered: int = 0
    rejected: int = 0
    failed: int = 0
    tokens: int = 0

    @property
    def rows(self) -> int:
        return self.answered + self.rejected + self.failed

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.answered + other.answered,
            self.rejected + other.rejected,
            self.failed + other.failed,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True)
class Answered:
    """A row with its answer; None where it asks nothing."""

    row: Row
    answer: Answer | None

    def columns(self) -> dict[str, Any]:
        """The values of `ADDED`."""
        if self.answer is None:
            assert isinstance(self.row.asked, Reject)
            reason = ": ".join(filter(None, (self.row.origin, self.row.asked.reason, self.row.asked.detail)))
            return dict(zip(ADDED, (None, "error", reason, 0), strict=True))
        error = f"{self.row.origin}: {self.answer.error}" if self.answer.error else None
        text = None if error else self.answer.text
        return dict(zip(ADDED, (text, self.answer.finish, error, self.answer.tokens), strict=True))

    @property
    def counts(self) -> Counts:
        if self.answer is None:
            return Counts(rejected=1)
        return Counts(failed=1) if self.answer.error else Counts(answered=1, tokens=self.answer.tokens)


@dataclass(frozen=True)
class Output:
    """One target file and its parts.

    Attributes:
        location: of the file that is made.
        prefix: of the added columns' names.
        schema: of the inputs, where all are Parquet.
    """

    location: str
    prefix: str = ""
    schema: pa.Schema | None = None

    @classmethod
    def of(cls, to: str, files: Sequence[File], prefix: str) -> Output:
        """An output by its name.

        Raises:
            DataError: its name tells no format, it is one of the inputs, or these do not fit together.
        """
        location = paths.absolute(to)
        output = cls(location, prefix)
        if not output.is_parquet and output._jsonl_suffix is None:
            raise DataError(
                f"the name of the output {to!r} tells no format",
                [f"end it in {', '.join(JSONL_SUFFIXES)} (also .gz, .zst) or .parquet"],
            )
        if location in {file.uri for file in files}:
            raise DataError(f"the output {to!r} is one of the inputs", ["name another file"])
        if output.is_parquet and all(file.kind == "parquet" for file in files):
            return replace(output, schema=_common_schema(files))
        return output

    @property
    def is_parquet(self) -> bool:
        return self._name.endswith(".parquet")

    @property
    def _name(self) -> str:
        return paths.base_name(self.location)

    @property
    def _jsonl_suffix(self) -> str | None:
        stem, last = posixpath.splitext(self._name)
        suffix = posixpath.splitext(stem)[1] + last if last in COMPRESSIONS else last
        return suffix if suffix.removesuffix(last if last in COMPRESSIONS else "") in JSONL_SUFFIXES else None

    @property
    def parts(self) -> str:
        """The folder of parts."""
        return paths.add_suffix(self.location, ".parts")

    def begin(self, state: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """The state to go on with: `state`, written now, or what an earlier call has written, if it is of the same.

        Args:
            state: what the answers depend on; "part_rows", of which they do not, is taken from the earlier call.

        Raises:
            DataError: the target is there already, or the parts are of something else.
        """
        file = paths.join(self.parts, STATE)
        state = {"format": STATE_FORMAT, **state}
        if overwrite:
            paths.delete_dir(self.parts)
        if paths.exists(file):
            before = paths.read_json(file)
            changed = [key for key in state if key != "part_rows" and state[key] != before.get(key)]
            if not changed:
                return {**state, "part_rows": before["part_rows"]}
            said = "; ".join(_difference(key, before.get(key), state[key]) for key in changed)
            raise DataError(
                f"{self.parts} holds answers to something else: {said}",
                ["repeat the earlier command to continue it", "begin again: --overwrite", "name another output"],
            )
        if paths.exists(self.location) and not overwrite:
            raise DataError(f"{self.location} is there already", ["name another output", "replace it: --overwrite"])
        paths.write_json(file, state)
        return state

    def committed(self) -> list[tuple[str, Counts]]:
        """Parts in order, up to the first that is missing."""
        found: list[tuple[str, Counts]] = []
        for name in paths.list_dir(self.parts):
            fields = name.split(".")
            if fields[0] == f"part-{len(found):06d}" and not name.endswith(".partial"):
                found.append((name, Counts(*map(int, fields[1].split("-")))))
        return found

    def commit(self, number: int, rows: Sequence[Answered]) -> Counts:
        """Write one part.

        Raises:
            DataError: a row cannot be held as it is.
        """
        for row in rows:
            if taken := [self.prefix + name for name in ADDED if self.prefix + name in row.row.content]:
                raise DataError(
                    f"{row.row.origin} has a column {taken[0]!r} of its own, which would be replaced",
                    ["give the added columns other names: --prefix model_"],
                )
        counts = sum((row.counts for row in rows), Counts())
        numbers = f"{counts.answered}-{counts.rejected}-{counts.failed}-{counts.tokens}"
        suffix = ".parquet" if self.is_parquet else self._jsonl_suffix
        content = self._parquet(rows) if self.is_parquet else self._lines(rows)
        paths.write_bytes(paths.join(self.parts, f"part-{number:06d}.{numbers}{suffix}"), content)
        return counts

    def assemble(self, names: Sequence[str]) -> None:
        """Make the target of its parts, then delete these."""
        locations = [paths.join(self.parts, name) for name in names]
        with paths.Appender(self.location) as target:
            if self.is_parquet:
                with tempfile.TemporaryFile() as scratch:
                    _write_parquet(scratch, locations)
                    scratch.seek(0)
                    while block := scratch.read(1 << 20):
                        target.write(block)
            else:
                for location in locations:
                    target.write_file(location)
        paths.delete_dir(self.parts)

    def _lines(self, rows: Sequence[Answered]) -> bytes:
        content = b"".join(self._line(row) for row in rows)
        if self._name.endswith(".gz"):
            return gzip.compress(content, mtime=0)
        if self._name.endswith(".zst"):
            import zstandard

            return zstandard.compress(content)
        return content

    def _line(self, row: Answered) -> bytes:
        """The row as it was written, digit for digit, with the added columns behind its last one."""
        added = _json({self.prefix + name: value for name, value in row.columns().items()}, row.row.origin)
        own = row.row.raw
        if own is None:
            own = _json(row.row.content, row.row.origin)
        head = own[:-1].rstrip()
        return head + (b"" if head == b"{" else b", ") + added[1:] + b"\n"

    def _parquet(self, rows: Sequence[Answered]) -> bytes:
        contents = [row.row.content for row in rows]
        if self.schema is not None:
            table = pa.Table.from_pylist(contents, schema=self.schema)
        else:
            names = list(dict.fromkeys(name for content in contents for name in content))
            try:
                table = pa.table({name: pa.array([content.get(name) for content in contents]) for name in names})
            except (pa.ArrowException, OverflowError) as error:
                raise _unfit(rows, str(error)) from error
            filled = [{name: content.get(name) for name in names} for content in contents]
            if json.dumps(table.to_pylist(), default=str) != json.dumps(filled, default=str):
                raise _unfit(rows, "a column's values are of several types, which Parquet would make one")
        columns = [row.columns() for row in rows]
        for name, kind in ADDED.items():
            table = table.append_column(self.prefix + name, pa.array([one[name] for one in columns], kind))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return sink.getvalue().to_pybytes()


def _json(content: dict[str, Any], origin: str) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{origin} holds a value that JSON has no form for: {error}", ["name an output that ends in .parquet"]
        ) from error


def _unfit(rows: Sequence[Answered], why: str) -> DataError:
    return DataError(
        f"the rows from {rows[0].row.origin} on do not fit a Parquet table unchanged: {why}",
        ["name an output that ends in .jsonl, which takes any rows"],
    )


def _common_schema(files: Sequence[File]) -> pa.Schema:
    schemas = []
    for file in files:
        fs, path = paths.filesystem(file.uri)
        with fs.open_input_file(path) as stream:
            schema = pq.read_schema(stream)
        # A row that cannot be read keeps its place, with nulls.
        schemas.append(pa.schema([field.with_nullable(True) for field in schema], metadata=schema.metadata))
    try:
        return pa.unify_schemas(schemas)
    except pa.ArrowException as error:
        raise DataError(
            f"the inputs have columns of one name and several types: {error}",
            ["name an output that ends in .jsonl", "answer each file on its own"],
        ) from error


def _write_parquet(target: Any, locations: Sequence[str]) -> None:
    tables = []
    for location in locations:
        fs, path = paths.filesystem(location)
        with fs.open_input_file(path) as stream:
            tables.append(pq.read_schema(stream))
    try:
        schema = pa.unify_schemas(tables) if tables else pa.schema([])
    except pa.ArrowException as error:
        raise DataError(
            f"the parts' columns have several types, so they make no Parquet file: {error}",
            [f"the answers are in {os.path.dirname(locations[0])}, a Parquet file for each part"],
        ) from error
    with pq.ParquetWriter(target, schema) as writer:
        for location in locations:
            fs, path = paths.filesystem(location)
            with fs.open_input_file(path) as stream:
                table = pq.read_table(stream)
            writer.write_table(pa.concat_tables([schema.empty_table(), table], promote_options="default"))


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in keys)
    if isinstance(before, list) and isinstance(now, list):
        was, names = {str(item[0]): item for item in before}, {str(item[0]): item for item in now}
        other = sorted(name for name in {**was, **names} if was.get(name) != names.get(name))
        return f"{key}: {', '.join(other[:3]) or 'their order'} changed"
    return f"{key} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:99] + "…"
