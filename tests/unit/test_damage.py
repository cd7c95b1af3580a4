"""Random damage, seeded: whole lines are used unaltered, at their lines; the rest is rejected, or the file refused."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ray_ft.data import sources
from ray_ft.data.lines import Reject
from ray_ft.data.prepare import Prepared, prepare
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Joined
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError
from ray_ft.recipe import Recipe, TextSource

ROWS = [{"id": 10**23 + n, "text": f"row {n} é 😀 {'x' * (n * 7 % 13)}"} for n in range(40)]
LINES = [json.dumps(row, ensure_ascii=n % 2 == 0).encode() for n, row in enumerate(ROWS)]
WHOLE = b"\n".join(LINES) + b"\n"
SEEDS = range(250)


def damaged(content: bytes, seed: int, times: int | None = None) -> bytes:
    """Some bytes overwritten, left out, put in, repeated, or all behind one of them lost."""
    chance = random.Random(seed)
    found = bytearray(content)
    for _ in range(times or chance.choice([1, 1, 2, 5, 20])):
        at, length = chance.randrange(len(found) or 1), chance.randrange(1, 40)
        match chance.randrange(12):
            case 0:
                del found[at:]
            case 1 | 2:
                del found[at : at + length]
            case 3:
                found[at:at] = chance.randbytes(length)
            case 4:
                found[at:at] = found[at : at + length]
            case 5 | 6:  # the bytes that mean something
                found[at : at + 1] = chance.choice([b"\n", b"\r", b"\0", b'"', b"{", b"}", b"[", b"\\", b"\xff", b","])
            case _:
                found[at : at + 1] = chance.randbytes(1)
    return bytes(found)


def read(path: Path, chunk_bytes: int) -> list[tuple[int, Any]]:
    """(line in the file, what is made of it) of every row."""
    source = TextSource(format="text", path=str(path))
    (file,) = sources.find_files(source)
    found: list[tuple[int, Any]] = []
    before = 0
    for chunk in sources.chunks_of(file, 0, chunk_bytes):
        line = 0
        for row in sources.read_rows(chunk):
            line = row.line
            if row.content is not None:
                found.append((before + line, row.content))
        before += line if file.kind == "jsonl" else 0
    return found


def as_written(content: bytes) -> dict[int, Any]:
    """Line → row, or None where the line is no row; by a reader of its own, of the whole file at once."""

    def only(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def refuse(_: str) -> None:
        raise ValueError

    found: dict[int, Any] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line.decode(), object_pairs_hook=only, parse_constant=refuse)
            except (ValueError, AssertionError):
                row = None
            found[number] = row if isinstance(row, dict) else None
    return found


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk_bytes", [1, 61, 700, 1 << 20])
def test_every_whole_line_is_read_unaltered_at_its_line(tmp_path: Path, suffix: str, chunk_bytes: int) -> None:
    file = tmp_path / f"data.jsonl{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    seeds = SEEDS if suffix == "" and chunk_bytes > 1 else SEEDS[::10]
    refusals: list[str] = []
    whole = bad = 0
    for seed in seeds:
        content = damaged(WHOLE, seed)
        file.write_bytes(pack(content))
        try:
            rows = read(file, chunk_bytes)
        except DataError as error:
            refusals.append(error.what)
            continue
        wanted = as_written(content)
        assert [line for line, _ in rows] == list(wanted), seed
        for line, row in rows:
            if wanted[line] is None:
                assert isinstance(row, Reject), (seed, line)
                bad += 1
            else:
                assert repr(row) == repr(wanted[line]), (seed, line)  # by repr: 1 == 1.0 == True
                whole += row in ROWS
    # That the test says something: most rows are whole, many are bad, and files are seldom taken for something else.
    assert whole > 20 * len(seeds) and bad > len(seeds) and len(refusals) <= len(seeds) / 25
    assert all("where its name says JSON lines" in refusal for refusal in refusals)


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.jsonl.zst", "data.parquet"])
def test_a_damaged_container_gives_all_rows_unaltered_or_an_error(tmp_path: Path, name: str) -> None:
    """With checksums, as gzip always has them; zstd and Parquet may be written without."""
    parquet = io.BytesIO()
    table = pa.Table.from_pylist([{"text": row["text"]} for row in ROWS])
    pq.write_table(table, parquet, row_group_size=11, write_page_checksum=True)
    good = {
        "data.jsonl.gz": gzip.compress(WHOLE),
        "data.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(WHOLE),
        "data.parquet": parquet.getvalue(),
    }[name]
    source = TextSource(format="text", path=str(tmp_path / name))
    outcomes: Counter[str] = Counter()
    for seed in SEEDS:
        (tmp_path / name).write_bytes(damaged(good, seed, times=1 + seed % 3))
        try:
            rows = read(tmp_path / name, 300)
        except DataError as error:
            outcomes["refused" if str(tmp_path / name) in error.what and error.ways_out else "baffled"] += 1
            continue
        samples = [to_sample(source, row) for _, row in rows]
        if any(isinstance(sample, Reject) for sample in samples):  # the name of the column is another now
            outcomes["rejected"] += 1
        else:
            assert samples == [Joined("", row["text"]) for row in ROWS], seed  # type: ignore[arg-type]
            outcomes["whole"] += 1
    assert outcomes["refused"] > len(SEEDS) / 2 and outcomes["rejected"] < len(SEEDS) / 50, outcomes
    assert not outcomes["baffled"]


@pytest.mark.parametrize("seed", range(0, 1000, 25))
def test_rows_in_are_rows_used_plus_rows_rejected(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    content = damaged(WHOLE, seed)
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    wanted = as_written(content)
    recipe = make_recipe("data.max_bad_rows=1", sources=[{"format": "text", "path": str(file)}])
    prepared: Prepared = prepare(recipe, "train", demo.base, in_process)  # none of these is taken for another kind
    used = {name for unit in prepared.units for row in range(unit.rows) for name in prepared.names(unit, row)}
    rejects = [json.loads(line) for line in Path(prepared.rejects).read_text().splitlines()]
    rejected = {f"{reject['file']}:{reject['line']}" for reject in rejects}
    assert prepared.counts.rows == len(wanted) == prepared.counts.used + len(rejects)
    assert used | rejected == {f"{file}:{line}" for line in wanted} and not used & rejected
    assert len(used) == prepared.counts.used and len(rejected) == len(rejects) == prepared.counts.rejected.total()
    assert {f"{file}:{line}" for line, row in wanted.items() if row in ROWS} <= used
