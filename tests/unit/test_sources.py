"""Bytes to rows: every line exactly once, nothing altered, and whatever cannot be read is said, with its line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ft.data import lines as lines_module
from ray_ft.data import sources
from ray_ft.data.lines import parse_line
from ray_ft.data.sources import Chunk, File, Reject, Row
from ray_ft.errors import DataError, StorageError
from ray_ft.recipe import TextSource

ROWS = [{"text": f"row {n} — {'x' * (n * 37 % 11)}"} for n in range(500)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def found(path: str | Path | list[str]) -> list[File]:
    return sources.find_files(
        TextSource(format="text", path=[str(p) for p in path] if isinstance(path, list) else str(path))
    )


def names(path: str | Path, root: Path) -> list[str]:
    return [str(Path(file.uri).relative_to(root)) for file in found(path)]


def read(path: str | Path, chunk_bytes: int | None = None) -> list[Row]:
    """All rows of one file; JSONL lines counted through the file, as preparing does."""
    (file,) = found(path)
    rows: list[Row] = []
    before = 0
    for chunk in sources.chunks_of(file, 0, chunk_bytes):
        part = list(sources.read_rows(chunk))
        rows += [Row(before + row.line, row.content) for row in part]
        if file.kind == "jsonl" and part:
            before += part[-1].line
    return rows


def contents(path: str | Path, chunk_bytes: int | None = None) -> list[Any]:
    return [row.content for row in read(path, chunk_bytes)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes, name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    return write


# ----------------------------------------------------------------------------------------------------------- lines

LINE = st.one_of(
    st.dictionaries(st.text(max_size=3), st.text(max_size=12) | st.integers(), max_size=3).map(
        lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
    ),
    st.sampled_from([b"", b"   ", b"{", b"null", b"\xff\xfe", '{"é": "😀"}'.encode()]),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources") / "data.jsonl"


@settings(deadline=None)  # the machine may be busy
@given(
    lines=st.lists(LINE, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last_end=st.booleans(),
    bom=st.booleans(),
    chunk_bytes=st.integers(1, 64),
)
def test_chunks_at_any_byte_give_every_line_exactly_once(
    scratch: Path, lines: list[bytes], end: bytes, last_end: bool, bom: bool, chunk_bytes: int
) -> None:
    body = end.join(lines) + (end if last_end and lines else b"")
    expected = [parse_line(line) if line.strip() else None for line in lines]
    if lines and not last_end and not lines[-1]:
        expected.pop()  # what follows the last line end is no line when it is empty
    if bom:
        expected = expected or [None]  # nothing but a mark
    scratch.write_bytes((b"\xef\xbb\xbf" if bom else b"") + body)
    rows = read(scratch, chunk_bytes)
    assert [row.content for row in rows] == expected
    assert [row.line for row in rows] == list(range(1, len(expected) + 1))


def test_chunks_cover_the_file_without_overlap(write: Callable[..., Path]) -> None:
    (file,) = found(write(LINES))
    chunks = sources.chunks_of(file, 3, 1000)
    assert len(chunks) == -(-len(LINES) // 1000)
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])] and chunks[-1].stop == len(LINES)
    assert {c.source for c in chunks} == {3}


def test_the_size_of_a_chunk_is_that_of_the_module(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = found(write(LINES))
    assert len(sources.chunks_of(file, 0)) == 1
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    assert len(sources.chunks_of(file, 0)) == -(-len(LINES) // 1000)


def test_a_line_across_several_chunks_belongs_to_the_one_in_which_it_begins(write: Callable[..., Path]) -> None:
    (file,) = found(write(b'{"a": 1}\n{"b": "' + b"x" * 95 + b'"}\n{"c": 3}\n'))
    parts = [[r.content for r in sources.read_rows(c)] for c in sources.chunks_of(file, 0, 20)]
    assert parts == [[{"a": 1}, {"b": "x" * 95}], [], [], [], [], [{"c": 3}], []]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(write: Callable[..., Path], end: bytes) -> None:
    file = write(b"\xef\xbb\xbf" + b'{"a": 1}' + end + b'{"b": "\xef\xbb\xbfx"}')
    assert contents(file) == [{"a": 1}, {"b": "\ufeffx"}]


def test_a_byte_order_mark_inside_a_compressed_file_is_removed_too(write: Callable[..., Path]) -> None:
    assert contents(write(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n'), "data.jsonl.gz")) == [{"a": 1}]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
def test_blank_lines_are_no_rows_but_count_as_lines(write: Callable[..., Path], chunk_bytes: int) -> None:
    rows = read(write(b'\n{"a": 1}\n\n \t\r\n{"b": 2}'), chunk_bytes)
    assert [(row.line, row.content) for row in rows if row.content is not None] == [(2, {"a": 1}), (5, {"b": 2})]
    assert len(rows) == 5


def test_a_line_too_long_is_rejected_and_the_next_one_read(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100)
    long = b'{"a": "' + b"x" * 1000 + b'"}'
    file = write(b'{"a": 1}\n' + long + b'\n{"b": 2}\n' + long)
    for chunk_bytes in (10, 64, 5000):
        first, rejected, second, last = contents(file, chunk_bytes)
        assert (first, second) == ({"a": 1}, {"b": 2})
        assert rejected.reason == last.reason == "line too long"
        assert f"{len(long) + 1} bytes" in rejected.detail and f"{len(long)} bytes" in last.detail


def test_an_empty_file_has_no_chunks(write: Callable[..., Path]) -> None:
    (file,) = found(write(b""))
    assert sources.chunks_of(file, 0) == []


def test_chunks_within_one_long_line_do_not_each_read_to_its_end(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0
    readinto = lines_module._Raw.readinto

    def counted(self: Any, buffer: Any) -> int:
        nonlocal passed
        passed += (length := readinto(self, buffer))
        return length

    file = write(b'{"a": 1}\n{"b": "' + b"x" * (20 << 20) + b'"}\n{"c": 3}\n')
    monkeypatch.setattr(lines_module._Raw, "readinto", counted)
    rows = contents(file, 1 << 20)
    assert [list(row) for row in rows] == [["a"], ["b"], ["c"]]
    assert passed < 4 * file.stat().st_size  # 10 times the file, if each of the 21 chunks did


def test_a_file_that_grew_or_shrank_since_it_was_listed_is_an_error(write: Callable[..., Path]) -> None:
    (file,) = found(path := write(LINES))
    for content in (LINES + LINES[:50], LINES[:-50]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data\.jsonl has \d+ bytes and had \d+ when it was listed"):
            [row for chunk in sources.chunks_of(file, 0) for row in sources.read_rows(chunk)]


# ------------------------------------------------------------------------------------------------------------ JSON


def rejected(line: bytes) -> Reject:
    result = parse_line(line)
    assert isinstance(result, Reject)
    return result


def test_values_come_as_they_are_written() -> None:
    line = (
        b'{"id": 123456789012345678901234, "date": "2024-01-02T03:04:05Z", "share": 0.1, "text": " 007 ", '
        b'"none": null, "deep": {"list": [1, "1", true]}}'
    )
    row = parse_line(line)
    assert row == {
        "id": 123456789012345678901234,
        "date": "2024-01-02T03:04:05Z",
        "share": 0.1,
        "text": " 007 ",
        "none": None,
        "deep": {"list": [1, "1", True]},
    }
    assert isinstance(row, dict) and type(row["id"]) is int and type(row["date"]) is str
    assert json.dumps(row["deep"]) == '{"list": [1, "1", true]}'  # == would take true for 1


@pytest.mark.parametrize(
    ("line", "detail"),
    [(b"null", "null"), (b'[{"a": 1}]', "a list"), (b'"text"', "a string"), (b"7", "a number"), (b"true", "a boolean")],
)
def test_a_line_that_is_no_object_is_rejected_by_its_type(line: bytes, detail: str) -> None:
    assert rejected(line) == Reject("not a JSON object", f"the line is {detail}")


@pytest.mark.parametrize("line", [b'{"a": 1, "b": 2, "a": 1}', b'{"deep": [{"a": 1, "a": 2}]}'])
def test_a_key_that_stands_twice_is_rejected_by_name(line: bytes) -> None:
    assert rejected(line) == Reject("duplicate key", "'a' stands twice")


@pytest.mark.parametrize("line", [b'{"a": 1', b'{"a": NaN}', b'{"a": -Infinity}', b"{'a': 1}", b'{"a": 1}{"b": 2}'])
def test_what_is_not_json_is_rejected(line: bytes) -> None:
    assert rejected(line).reason == "invalid JSON"


def test_a_key_that_stands_twice_is_found_among_many() -> None:
    keys = ", ".join(f'"k{n}": 1' for n in range(100_000))  # each against each would take minutes
    assert rejected(f'{{{keys}, "k99999": 2}}'.encode()) == Reject("duplicate key", "'k99999' stands twice")


def test_json_nested_or_long_beyond_reason_is_rejected_not_a_crash() -> None:
    assert rejected(b'{"a": ' + b"[" * 100_000).reason == "invalid JSON"
    assert rejected(b'{"a": ' + b"9" * 10_000 + b"}").reason == "invalid JSON"


def test_invalid_utf8_is_rejected_with_its_byte() -> None:
    assert rejected(b'{"a": "\xe9"}') == Reject("invalid UTF-8", "at byte 7 of the line")


# ------------------------------------------------------------------------------------------------------ compressed


def two_frames(compress: Callable[[bytes], bytes]) -> bytes:
    half = len(LINES) // 2  # within a line
    return compress(LINES[:half]) + compress(LINES[half:])


COMPRESS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
KIND = {".gz": "gzip", ".zst": "zstd"}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("several", [False, True])
def test_compressed_files_read_like_plain_ones(write: Callable[..., Path], suffix: str, several: bool) -> None:
    compress = COMPRESS[suffix]
    file = write(two_frames(compress) if several else compress(LINES), f"data.jsonl{suffix}")
    rows = read(file, 100)
    assert [row.content for row in rows] == ROWS
    assert [row.line for row in rows] == list(range(1, len(ROWS) + 1))


def test_zstd_written_as_a_stream_reads_too(write: Callable[..., Path]) -> None:
    stream = zstandard.ZstdCompressor().compressobj()  # its frames do not say how long they are
    file = write(b"".join([stream.compress(LINES), stream.flush()]), "data.jsonl.zst")
    assert contents(file) == ROWS


def until_it_breaks(file: Path) -> tuple[list[Any], str]:
    """The rows before the damage, and what is said of it."""
    chunks = sources.chunks_of(found(file)[0], 0)
    rows: list[Any] = []
    with pytest.raises(DataError) as caught:
        rows.extend(row.content for chunk in chunks for row in sources.read_rows(chunk))
    assert str(file) in str(caught.value) and "take it out of data.train / data.eval" in str(caught.value)
    return rows, caught.value.what


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_compressed_file_cut_short_is_an_error_with_its_line_and_nothing_before_is_altered(
    write: Callable[..., Path], suffix: str, share: float
) -> None:
    """Not a reject: that would be one bad row, however many the lost rest held."""
    whole = COMPRESS[suffix](LINES)
    good, said = until_it_breaks(write(whole[: int(share * len(whole))], f"data.jsonl{suffix}"))
    assert f"({int(share * len(whole))} bytes) is not a readable {KIND[suffix]} file" in said
    assert f"breaks after line {len(good)}:" in said
    assert good == ROWS[: len(good)] and len(good) < len(ROWS)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_not_what_its_suffix_says_is_an_error(write: Callable[..., Path], suffix: str) -> None:
    good, said = until_it_breaks(write(LINES, f"data.jsonl{suffix}"))
    assert not good and f"is plain text, where its name says a {KIND[suffix]} file" in said


def test_damage_in_the_middle_of_gzip_is_an_error(write: Callable[..., Path]) -> None:
    whole = bytearray(gzip.compress(LINES))
    whole[-6] ^= 1  # the checksum: every byte arrives, and one of them may be wrong
    good, said = until_it_breaks(write(bytes(whole), "data.jsonl.gz"))
    assert good == ROWS and f"breaks after line {len(ROWS)}: CRC" in said


def test_a_storage_that_fails_is_not_taken_for_damage(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError("connection reset")

    file = write(gzip.compress(LINES), "data.jsonl.gz")
    monkeypatch.setattr(lines_module._Raw, "readinto", fail)
    with pytest.raises(OSError, match="connection reset"):
        read(file)


# --------------------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=64)
    return file


@pytest.mark.parametrize(("chunk_bytes", "expected"), [(1, {8}), (3000, {2, 3, 4, 5, 6, 7}), (1 << 30, {1})])
def test_parquet_row_groups_give_every_row_once_with_its_number_in_the_file(
    table: Path, chunk_bytes: int, expected: set[int]
) -> None:
    (file,) = found(table)
    chunks = sources.chunks_of(file, 0, chunk_bytes)
    assert len(chunks) in expected
    rows = [row for chunk in chunks for row in sources.read_rows(chunk)]
    assert [row.content for row in rows] == ROWS
    assert [row.line for row in rows] == list(range(1, len(ROWS) + 1))


def test_parquet_nulls_and_nested_messages_come_as_they_are(tmp_path: Path) -> None:
    rows = [{"id": 2**60 + 1, "messages": [{"role": "user", "content": "a"}]}, {"id": None, "messages": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert contents(tmp_path / "data.parquet") == rows


@pytest.mark.parametrize("keep", [0, 10, -20])
def test_an_empty_or_truncated_parquet_is_an_error_with_its_name(table: Path, keep: int) -> None:
    table.write_bytes(table.read_bytes()[:keep])
    (file,) = found(table)
    for opens in (lambda: sources.chunks_of(file, 0), lambda: sources.parquet_columns(file)):
        with pytest.raises(DataError, match="not a readable Parquet file") as caught:
            opens()
        assert str(table) in str(caught.value) and f"({table.stat().st_size} bytes)" in str(caught.value)


def test_damaged_parquet_pages_are_an_error_with_the_file_name(table: Path) -> None:
    content = bytearray(table.read_bytes())
    content[4:200] = b"\xff" * 196  # the footer is whole, the first pages are not
    table.write_bytes(content)
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        read(table)
    assert str(table) in str(caught.value)


def test_a_parquet_footer_that_promises_other_rows_than_it_lists_is_an_error(table: Path) -> None:
    """The footer has no checksum: a wrong byte there may drop a whole row group."""
    content = table.read_bytes()
    promise = b"\x16\xe8\x07"  # field 3, an i64: 500 in Thrift's compact form; row groups have 64 rows
    assert content.count(promise) == 1
    table.write_bytes(content.replace(promise, b"\x16\xe6\x07"))
    with pytest.raises(DataError, match="its footer promises 499 rows, its row groups 500"):
        read(table)


def test_a_parquet_column_whose_name_is_no_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"name": ["a"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"name", b"n\xffme"))
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_parquet_without_rows_has_no_chunks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet") == []


# --------------------------------------------------------------------------------------------------------- finding


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in (
        "a.jsonl",
        "b.json.gz",
        "notes.md",
        ".hidden.jsonl",
        "_meta.json",
        "x/c.ndjson.zst",
        "x/y/d.parquet",
        "x/.checkpoints/a.jsonl",
        "x/_delta_log/0.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}\n")
    return root


def test_a_folder_means_all_its_data_files_but_what_tools_hide_there(tree: Path) -> None:
    assert names(tree, tree) == ["a.jsonl", "b.json.gz", "x/c.ndjson.zst", "x/y/d.parquet"]
    assert names(f"{tree}/x/", tree) == ["x/c.ndjson.zst", "x/y/d.parquet"]


def test_a_folder_below_a_hidden_one_is_data_when_it_is_named(tree: Path) -> None:
    assert names(tree / "x" / "_delta_log", tree) == ["x/_delta_log/0.json"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("[ab].json*", ["a.jsonl", "b.json.gz"]),
        ("?.jsonl", ["a.jsonl"]),
        (".*.jsonl", [".hidden.jsonl"]),
        ("*/*.zst", ["x/c.ndjson.zst"]),
        ("**/*.jsonl", ["a.jsonl"]),
        ("**/*.parquet", ["x/y/d.parquet"]),
        ("x/**", ["x/_delta_log/0.json", "x/c.ndjson.zst", "x/y/d.parquet"]),
        ("**/y/**/*.parquet", ["x/y/d.parquet"]),
        ("*/y/*", ["x/y/d.parquet"]),
    ],
)
def test_globs_mean_what_they_mean_in_a_shell(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(f"{tree}/{pattern}", tree) == expected


def test_several_paths_keep_their_order(tree: Path) -> None:
    files = found([f"{tree}/x/**/*.parquet", f"{tree}/a.jsonl"])
    assert [Path(file.uri).name for file in files] == ["d.parquet", "a.jsonl"]


def test_a_file_uri_is_a_local_path(tree: Path) -> None:
    assert found(f"file://{tree}/a.jsonl") == found(tree / "a.jsonl")


def test_files_of_an_fsspec_protocol_are_found_and_read() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/ray-ft-test/a.jsonl", LINES)
    try:
        assert contents("memory://ray-ft-test/*.jsonl", 1000) == ROWS
    finally:
        memory.rm("/ray-ft-test", recursive=True)


def test_names_in_a_uri_are_escaped_and_globs_may_hold_any_sign(tmp_path: Path) -> None:
    for name in ("part 1%.jsonl", "part-2.jsonl", "x=é#/part-3.jsonl"):
        file = tmp_path / "a b" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(LINES)
    root = tmp_path / "a b"
    for pattern, expected in {
        "": ["part 1%.jsonl", "part-2.jsonl", "x=é#/part-3.jsonl"],
        "/part%20*": ["part 1%.jsonl"],
        "/part-?.jsonl": ["part-2.jsonl"],
        "/*/part-[3].jsonl": ["x=é#/part-3.jsonl"],
        "/part-2.jsonl": ["part-2.jsonl"],
    }.items():
        assert names(f"file://{tmp_path}/a%20b{pattern}", root) == expected


@pytest.mark.parametrize("path", ["none.jsonl", "none/", "*.parquet", "none/**/*.jsonl"])
def test_a_path_that_matches_nothing_is_an_error_with_the_path(tree: Path, path: str) -> None:
    with pytest.raises(DataError, match="matches no file") as caught:
        found(f"{tree}/{path}")
    assert f"{tree}/{path}".rstrip("/") in str(caught.value)


def test_a_folder_without_data_files_is_an_error(tree: Path) -> None:
    (tree / "empty").mkdir()
    (tree / "empty" / "notes.md").touch()
    with pytest.raises(DataError, match="matches no file"):
        found(tree / "empty")


@pytest.mark.parametrize("path", ["notes.md", "*.md", "**"])
def test_a_file_of_unknown_kind_is_an_error_when_it_is_named(tree: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"notes\.md is of no known kind"):
        found(f"{tree}/{path}")


def test_an_unknown_protocol_is_an_error_with_the_location() -> None:
    with pytest.raises(StorageError, match="nosuch://data"):
        found("nosuch://data/a.jsonl")


def test_the_stamp_of_a_file_tells_another_content(write: Callable[..., Path]) -> None:
    before = found(write(b'{"a": 1}\n'))[0].stamp
    assert found(write(b'{"a": 12}\n'))[0].stamp != before


def test_a_chunk_survives_the_way_to_another_process(table: Path) -> None:
    import pickle

    (file,) = found(table)
    chunks: list[Chunk] = sources.chunks_of(file, 1, 3000)
    assert pickle.loads(pickle.dumps(chunks)) == chunks
