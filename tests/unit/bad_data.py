"""The corpus of bad data: what each input holds and what must become of it.

`python tests/unit/bad_data.py` writes docs/bad_data.md, which is made of it. Each case is a folder of files. `used`
says which rows are trained on, as ``file:line`` → exactly the text that was written; `rejects` which are not, and why;
`refused` begins the error that stops the run. Every other line is blank.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

INTRODUCTION = """\
# What becomes of bad data

Rows in = rows used + rows rejected, and nothing is altered silently: what is used gives back, token for token, exactly
what was written. (A chat template may say otherwise: Gemma's leaves out the white space around a turn.)

- A **row** that cannot be used is rejected. It is counted by reason, and `data/rejects.jsonl` in the run directory says
  file, line, reason and detail. More than `data.max_bad_rows` of them (1%) stop the run.
- A **file** that cannot be read stops the run, with its name and a way out. It is not rejected: a whole file that is
  lost would count as one bad row, or its lines as thousands of baffling ones.
- A row that holds the text of a special token of the model's tokenizer, such as `<end_of_turn>`, is rejected: the
  tokenizer would make the token itself of it, and a quoted end of a turn would end the turn. Those that the recipe's
  own `prompt` and `completion` templates hold are meant.
- A row that equals an earlier one is used and counted ("12 duplicate rows, used").
- User info and query of a URI, where credentials stand, are left out of every name of a file that is shown or stored.

The tables are made from the cases of a test (`tests/unit/bad_data.py`), which runs each of them.
"""

DOCS = Path(__file__).parents[2] / "docs" / "bad_data.md"
FILE = "data.jsonl"
GOOD = [{"text": f"good row {n} é 😀"} for n in range(3)]


#: A source whose answers think.
THINKING = {"format": "prompt_completion", "chat": False, "thinking": {"open": "<t>", "close": "</t>"}}


def line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def jsonl(*rows: Any) -> bytes:
    return b"".join(line(row) + b"\n" for row in rows)


def table(columns: dict[str, Any], names: list[str] | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    arrays = [column if isinstance(column, pa.Array) else pa.array(column) for column in columns.values()]
    pq.write_table(pa.Table.from_arrays(arrays, names=names or list(columns)), buffer, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Case:
    name: str
    files: dict[str, bytes | Callable[[], bytes]]
    """Content of each file, or what makes it, where it is large."""
    used: dict[str, str] = field(default_factory=dict)
    rejects: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    """How the message of the error begins; {FILE} stands for path and size of the file."""
    way_out: str = ""
    """The first way out that the error names."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``file:line`` → all values of the row as they must be read, types included."""
    duplicates: int = 0
    note: str = ""
    source: dict[str, Any] = field(default_factory=lambda: {"format": "text"})
    overrides: tuple[str, ...] = ()
    big: bool = False
    """Too big for chunks of a few bytes."""

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content())


GROUPS: dict[str, list[Case]] = {}


def group(name: str) -> Callable[[Callable[[], list[Case]]], None]:
    def add(make: Callable[[], list[Case]]) -> None:
        GROUPS[name] = make()

    return add


def good_lines(first: int = 1, name: str = FILE) -> dict[str, str]:
    return {f"{name}:{first + n}": row["text"] for n, row in enumerate(GOOD)}


def between(row: Any) -> bytes | Callable[[], bytes]:
    """A row between good ones; or what makes them, where the row is large and has to be made."""
    return (lambda: jsonl(GOOD[0], row(), GOOD[1])) if callable(row) else jsonl(GOOD[0], row, GOOD[1])


def bad_row(name: str, row: Any, reason: str, **more: Any) -> Case:
    """A bad row between good ones: it alone is rejected."""
    used = {f"{FILE}:1": GOOD[0]["text"], f"{FILE}:3": GOOD[1]["text"]}
    return Case(name, {FILE: between(row)}, used, {f"{FILE}:2": reason}, **more)


def odd_row(name: str, row: Any, text: str, **more: Any) -> Case:
    """A row that looks bad and is not, between good ones."""
    used = {f"{FILE}:1": GOOD[0]["text"], f"{FILE}:2": text, f"{FILE}:3": GOOD[1]["text"]}
    return Case(name, {FILE: between(row)}, used, **more)


def refused(
    name: str, file: str, content: bytes | Callable[[], bytes], message: str, way_out: str, **more: Any
) -> Case:
    """A file that cannot be read, beside a good one."""
    files = {file: content, "good.jsonl": jsonl(*GOOD)}
    return Case(name, files, refused=message, way_out=way_out, **more)


@group("Rows")
def _rows() -> list[Case]:
    text = "field 'text' is {}, not a string"
    return [
        bad_row("line cut short", b'{"text": "a', "invalid JSON"),
        Case(
            "last line cut short",
            {FILE: jsonl(*GOOD) + b'{"text": "a'},
            good_lines(),
            {f"{FILE}:4": "invalid JSON"},
        ),
        bad_row("invalid UTF-8", b'{"text": "caf\xe9"}', "invalid UTF-8"),
        bad_row("NUL bytes", b'{"text": "a\0b"}', "NUL byte"),
        Case(
            "a tail of NUL bytes, as a crash leaves it",
            {FILE: jsonl(*GOOD) + bytes(300)},
            good_lines(),
            {f"{FILE}:4": "NUL byte"},
        ),
        odd_row("an escaped NUL in a string", rb'{"text": "a\u0000b"}', "a\0b"),
        bad_row("`null`", b"null", "not a JSON object"),
        bad_row("a list", b'["a"]', "not a JSON object"),
        bad_row("a field is missing", {"other": "a"}, "missing field 'text'"),
        bad_row("a field is null", {"text": None}, text.format("null")),
        Case(
            "a field changes its type half-way",
            {FILE: jsonl(*GOOD, {"text": 4}, {"text": 4.5}, {"text": ["a"]}, {"text": {"a": "b"}}, {"text": True})},
            good_lines(),
            {f"{FILE}:{4 + n}": text.format(kind) for n, kind in enumerate(("int", "float", "list", "dict", "bool"))},
        ),
        bad_row("a key stands twice", b'{"text": "a", "text": "b"}', "duplicate key"),
        odd_row(
            "a 24-digit id beside the text",
            b'{"id": 123456789012345678901234, "text": "a"}',
            "a",
            values={f"{FILE}:2": {"id": 123456789012345678901234, "text": "a"}},
        ),
        bad_row("a 24-digit id as the text", b'{"text": 123456789012345678901234}', text.format("int")),
        odd_row("an ISO date", {"text": "2024-01-02T03:04:05Z"}, "2024-01-02T03:04:05Z"),
        odd_row("digits, leading zeros, outer white space", {"text": " 007 \t"}, " 007 \t"),
        bad_row("a lone surrogate", rb'{"text": "a\ud800"}', "field 'text' holds a lone surrogate"),
        odd_row("a surrogate pair", rb'{"text": "a\ud83d\ude00"}', "a😀"),
        odd_row(
            "characters not composed (NFD), zero-width ones", {"text": "e\u0301\u200b\ufeff"}, "e\u0301\u200b\ufeff"
        ),
        bad_row("`NaN`", b'{"text": "a", "score": NaN}', "invalid JSON"),
        bad_row("`-Infinity`", b'{"text": "a", "score": -Infinity}', "invalid JSON"),
        bad_row("nested 100,000 deep", b'{"text": "a", "x": ' + b"[" * 100_000 + b"}", "invalid JSON", big=True),
        bad_row("nested 200 deep, as the text", b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}", text.format("list")),
        bad_row("two objects on a line", b'{"text": "a"}{"text": "b"}', "invalid JSON"),
        Case(
            "mixed schemas",
            {FILE: jsonl(GOOD[0], {"prompt": "a", "completion": "b"}, GOOD[1], {"messages": []}, GOOD[2])},
            {f"{FILE}:{1 + 2 * n}": row["text"] for n, row in enumerate(GOOD)},
            {f"{FILE}:2": "missing field 'text'", f"{FILE}:4": "missing field 'text'"},
        ),
        bad_row("empty text", {"text": " \n"}, "field 'text' is empty"),
        bad_row(
            "a special token in the text",
            {"text": "say <end_of_turn> now"},
            "holds the special token '<end_of_turn>'",
        ),
        odd_row("nearly a special token", {"text": "say < end_of_turn> now <eos >"}, "say < end_of_turn> now <eos >"),
        Case(
            "a special token where prompt and answer meet",
            {FILE: jsonl({"prompt": "a <bo", "completion": "s> b"}, {"prompt": "a ", "completion": "b"})},
            {f"{FILE}:2": "a b"},
            {f"{FILE}:1": "holds the special token '<bos>'"},
            source={"format": "prompt_completion", "chat": False},
        ),
        Case(
            "a special token that the recipe's own template writes",
            {FILE: jsonl({"q": "a", "a": "b"}, {"q": "a<eos>", "a": "b"})},
            {f"{FILE}:1": "Q: a<eos>A: b"},
            {f"{FILE}:2": "holds the special token '<eos>'"},
            source={"format": "template", "prompt": "Q: {q}<eos>", "completion": "A: {a}", "chat": False},
        ),
        Case(
            "empty answer",
            {FILE: jsonl({"prompt": "a", "completion": ""}, {"prompt": "a ", "completion": "b"})},
            {f"{FILE}:2": "a b"},
            {f"{FILE}:1": "field 'completion' is empty"},
            source={"format": "prompt_completion", "chat": False},
        ),
        *(
            Case(
                name,
                {FILE: jsonl({"prompt": "a ", "completion": answer}, {"prompt": "a ", "completion": "<t>b</t>c"})},
                {f"{FILE}:2": "a <t>b</t>c"},
                {f"{FILE}:1": reason},
                source=dict(THINKING),
            )
            for name, answer, reason in (
                ("thinking without its end", "<t>b c", "thinking is not closed"),
                ("thinking without its beginning", "b</t>c", "thinking is closed but not opened"),
                ("thinking within thinking", "<t>a<t>b</t>c", "thinking within thinking"),
                ("thinking twice", "<t>a</t>b<t>a</t>c", "thinks twice in one answer"),
                ("thinking and no answer", "<t>a</t>", "nothing after the thinking"),
            )
        ),
        Case(
            "all tokens masked: cut before the answer",
            {FILE: jsonl({"prompt": "one " * 200, "completion": "b"}, {"prompt": "a ", "completion": "b"})},
            {f"{FILE}:2": "a b"},
            {f"{FILE}:1": "nothing to train on"},
            source={"format": "prompt_completion", "chat": False},
            overrides=("data.long_rows=truncate",),
        ),
        Case(
            "duplicate rows, duplicate ids",
            {
                FILE: jsonl({"id": 1, "text": "a"}, {"id": 1, "text": "b"}, {"id": 2, "text": "a"}),
                "other.jsonl": jsonl({"id": 3, "text": "a"}),
            },
            {f"{FILE}:1": "a", f"{FILE}:2": "b", f"{FILE}:3": "a", "other.jsonl:1": "a"},
            duplicates=2,
            note="rows with equal text are counted; ids mean nothing to training",
        ),
        bad_row("20 MB of text", lambda: {"text": "word " * (4 << 20)}, "longer than seq_len", big=True),
        odd_row("20 MB beside the text", lambda: {"text": "a", "html": "x" * (20 << 20)}, "a", big=True),
        bad_row("a line over 64 MiB", lambda: b'{"text": "' + b"x" * (64 << 20) + b'"}', "line too long", big=True),
    ]


@group("Lines and encodings")
def _lines() -> list[Case]:
    rows = jsonl(*GOOD)
    return [
        Case("CRLF", {FILE: rows.replace(b"\n", b"\r\n")}, good_lines()),
        Case("no line end at the end", {FILE: rows[:-1]}, good_lines()),
        Case(
            "blank lines",
            {FILE: b"\n" + jsonl(GOOD[0]) + b"\n \t\r\n" + jsonl(*GOOD[1:]) + b"\n"},
            {f"{FILE}:2": GOOD[0]["text"], f"{FILE}:5": GOOD[1]["text"], f"{FILE}:6": GOOD[2]["text"]},
            note="no rows, but counted as lines",
        ),
        Case("a UTF-8 byte order mark", {FILE: b"\xef\xbb\xbf" + rows}, good_lines()),
        bad_row("a byte order mark within the file", b"\xef\xbb\xbf" + line({"text": "a"}), "invalid JSON"),
        *(
            refused(
                f"{name} with{'' if mark else 'out'} byte order mark{' (big-endian)' * (codec == 'utf-16-be')}",
                FILE,
                (mark + rows.decode()).encode(codec),
                f"{{FILE}} is {name}{'' if mark else ' without a byte order mark'}, where its name says JSON lines",
                f"convert it: iconv -f {name} -t UTF-8 FILE > NEW.jsonl",
            )
            for name, codec, mark in (
                ("UTF-16", "utf-16-le", "\ufeff"),
                ("UTF-16", "utf-16-be", "\ufeff"),
                ("UTF-16LE", "utf-16-le", ""),
                ("UTF-16BE", "utf-16-be", ""),
                ("UTF-32", "utf-32-le", "\ufeff"),
            )
        ),
        refused(
            "line ends of CR alone",
            FILE,
            rows.replace(b"\n", b"\r"),
            "{FILE} is text whose lines end in CR alone, where its name says JSON lines",
            r"convert it: tr '\r' '\n' < FILE > NEW.jsonl",
        ),
        refused(
            "more than 64 MiB without a line end",
            FILE,
            lambda: b'{"text": "a"} ' * (5 << 20),
            "{FILE} holds no line end in its first 67108864 bytes, so it is not JSON lines: one object per line",
            "write each row on a line of its own",
            big=True,
        ),
        refused(
            "NUL bytes alone, a file that was never written",
            FILE,
            bytes(5000),
            "{FILE} is NUL bytes, where its name says JSON lines",
            "copy it again: it was never fully written",
        ),
        Case("an empty file beside a good one", {FILE: rows, "empty.jsonl": b""}, good_lines()),
        Case(
            "empty files alone",
            {FILE: b"", "blank.jsonl": b"\n"},
            refused="data.train is empty: its files hold no rows",
            way_out="check that the right files are named",
        ),
        *(
            refused(
                f"a JSON array {how}",
                "data.json",
                json.dumps(GOOD, indent=indent).encode(),
                "{FILE} is one JSON array, where its name says JSON lines",
                'write one JSON object per line: python -c "import json, sys; '
                '[print(json.dumps(row)) for row in json.load(sys.stdin)]" < FILE > NEW.jsonl',
            )
            for how, indent in (("on one line", None), ("over several lines", 2))
        ),
        refused(
            "JSON objects written over several lines",
            "data.json",
            b"\n".join(json.dumps(row, indent=1).encode() for row in GOOD),
            "{FILE} is JSON written over several lines, where its name says JSON lines",
            "write one JSON object per line: jq -c . FILE > NEW.jsonl (jq 1.7 or later; older ones alter long numbers)",
        ),
        Case(
            "rows that are lists",
            {FILE: jsonl([{"text": "a"}], GOOD[0], [{"text": "b"}])},
            {f"{FILE}:2": GOOD[0]["text"]},
            {f"{FILE}:1": "not a JSON object", f"{FILE}:3": "not a JSON object"},
        ),
        refused(
            "a Git LFS pointer",
            FILE,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "{FILE} is a Git LFS pointer, not the file itself, where its name says JSON lines",
            "fetch the file: git lfs pull",
        ),
        refused(
            "a web page in place of the file",
            FILE,
            b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n",
            "{FILE} is a web page, where its name says JSON lines",
            "download it again: the server has sent a page in its place",
        ),
    ]


@group("Compressed files")
def _compressed() -> list[Case]:
    rows = jsonl(*GOOD)
    packed = gzip.compress(rows, mtime=0)
    wrong = packed[:-5] + bytes([packed[-5] ^ 1]) + packed[-4:]
    copy = "copy it again, if the original is whole"
    named = "{FILE} is plain text, where its name says a "
    return [
        Case(
            "gzip and zstd",
            {"a.jsonl.gz": packed, "b.jsonl.zst": zstandard.compress(rows)},
            {**good_lines(name="a.jsonl.gz"), **good_lines(name="b.jsonl.zst")},
            duplicates=3,
        ),
        refused(
            "gzip with a wrong byte",
            "data.jsonl.gz",
            wrong,
            "{FILE} is not a readable gzip file: it breaks after line 3: CRC check failed",
            copy,
        ),
        refused(
            "gzip cut short",
            "data.jsonl.gz",
            packed[:-20],
            "{FILE} is not a readable gzip file: it breaks after line 0: Compressed file ended before the "
            "end-of-stream marker was reached",
            copy,
        ),
        refused(
            "zstd cut short",
            "data.jsonl.zst",
            zstandard.compress(rows)[:-4],
            "{FILE} is not a readable zstd file: it breaks after line 0: the file ends within a frame",
            copy,
        ),
        refused(
            "gzip of no bytes",
            "data.jsonl.gz",
            b"",
            "{FILE} is not a readable gzip file: it breaks after line 0: the file is empty",
            copy,
        ),
        refused(
            "plain text named .gz", "data.jsonl.gz", rows, named + "gzip file", "take the .gz or .zst from its name"
        ),
        refused(
            "plain text named .zst", "data.jsonl.zst", rows, named + "zstd file", "take the .gz or .zst from its name"
        ),
        refused(
            "gzip named .jsonl", FILE, packed, "{FILE} is gzip, where its name says JSON lines", "name it .jsonl.gz"
        ),
        refused(
            "zstd named .gz",
            "data.jsonl.gz",
            zstandard.compress(rows),
            "{FILE} is zstd, where its name says a gzip file",
            "name it .jsonl.zst",
        ),
        refused(
            "gzip within gzip",
            "data.jsonl.gz",
            gzip.compress(packed),
            "{FILE} is gzip, where its name says JSON lines",
            "name it .jsonl.gz",
        ),
        refused(
            "gzip of UTF-16",
            "data.jsonl.gz",
            gzip.compress(rows.decode().encode("utf-16")),
            "{FILE} is UTF-16, where its name says JSON lines",
            "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW.jsonl",
        ),
    ]


@group("Parquet")
def _parquet() -> list[Case]:
    name = "data.parquet"
    texts = [row["text"] for row in GOOD]
    whole = table({"text": texts})
    copy = "copy it again, if the original is whole: a file that was cut short has lost the footer at its end"
    broken = "{FILE} is not a readable Parquet file: "
    big = 2**60 + 1  # a float would make 2**60 of it
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0\6\0\0\0"), pa.py_buffer(b"acaf\xe9b")]
    )
    return [
        Case(
            "ids int64 in one file, double in another",
            {"a.parquet": table({"id": [big], "text": ["a"]}), "b.parquet": table({"id": [0.5], "text": ["b"]})},
            {"a.parquet:1": "a", "b.parquet:1": "b"},
            values={"a.parquet:1": {"id": big, "text": "a"}, "b.parquet:1": {"id": 0.5, "text": "b"}},
        ),
        Case(
            "the text is int64 in one file, double in another",
            {"a.parquet": table({"text": [big]}), "b.parquet": table({"text": [0.5]}), name: whole},
            good_lines(name=name),
            {
                "a.parquet:1": "field 'text' is int, not a string",
                "b.parquet:1": "field 'text' is float, not a string",
            },
            values={"a.parquet:1": {"text": big}, "b.parquet:1": {"text": 0.5}},
        ),
        Case(
            "nulls",
            {name: table({"text": [texts[0], None, texts[1]]})},
            {f"{name}:1": texts[0], f"{name}:3": texts[1]},
            {f"{name}:2": "field 'text' is null, not a string"},
        ),
        Case("dictionary", {name: table({"text": pa.array(texts).dictionary_encode()})}, good_lines(name=name)),
        Case("large_string", {name: table({"text": pa.array(texts, pa.large_string())})}, good_lines(name=name)),
        Case(
            "binary",
            {name: table({"text": pa.array([text.encode() for text in texts])}), FILE: jsonl(*GOOD)},
            good_lines(),
            {f"{name}:{n}": "field 'text' is bytes, not a string" for n in (1, 2, 3)},
        ),
        Case(
            "invalid UTF-8",
            {name: table({"text": not_utf8})},
            {f"{name}:1": "a", f"{name}:3": "b"},
            {f"{name}:2": "invalid UTF-8"},
        ),
        Case(
            "nested columns",
            {name: table({"text": texts, "meta": [{"a": [1, None]}, None, {"a": []}]}, row_group_size=1)},
            good_lines(name=name),
            values={f"{name}:1": {"text": texts[0], "meta": {"a": [1, None]}}},
        ),
        refused(
            "two columns of one name",
            name,
            table({"text": texts, "other": texts}, names=["text", "text"]),
            "{PATH} has 2 columns of the name 'text': which is meant cannot be known",
            "write it again with distinct names, or take it out of data.train / data.eval",
        ),
        refused(
            "a column is missing",
            name,
            table({"body": texts}),
            "{PATH} lacks column 'text'; it has 'body'",
            "name the right columns in the source's *_field settings",
        ),
        refused(
            "no bytes",
            name,
            b"",
            broken + "Parquet file size is 0 bytes",
            copy,
        ),
        refused("cut short", name, whole[:-20], broken + "Parquet magic bytes not found in footer.", copy),
        refused(
            "a wrong page",
            name,
            whole[:4] + b"\xff" * 40 + whole[44:],
            broken,
            copy,
        ),
        refused(
            "JSON lines named .parquet", name, jsonl(*GOOD), broken + "Parquet magic bytes not found in footer.", copy
        ),
        refused(
            "Parquet named .jsonl", FILE, whole, "{FILE} is Parquet, where its name says JSON lines", "name it .parquet"
        ),
    ]


def document() -> str:
    """docs/bad_data.md."""
    parts = [INTRODUCTION]
    for title, cases in GROUPS.items():
        lines = [f"| {case.name} | {_outcome(case)} |" for case in cases]
        parts.append("\n".join([f"## {title}", "", "| input | what becomes of it |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def _outcome(case: Case) -> str:
    if case.refused:
        message = case.refused.format(FILE="FILE (N bytes)", PATH="FILE").rstrip(": .")
        return f"**the run stops**: `{message}` → `{case.way_out}`"
    if not case.rejects:
        said = "used, exactly as written"
    else:
        reasons = "; ".join(f"`{reason}`" for reason in dict.fromkeys(case.rejects.values()))
        rows = "the row is" if len(case.rejects) == 1 else f"{len(case.rejects)} rows are"
        said = f"{rows} rejected: {reasons}"
    if case.duplicates:
        said += f"; {case.duplicates} duplicates counted"
    return said + (f" ({case.note})" if case.note else "")


if __name__ == "__main__":
    DOCS.write_text(document())
