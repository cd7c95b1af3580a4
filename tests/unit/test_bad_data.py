"""Each kind of bad data through the whole way: what is used is what was written, the rest is said, with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bad_data
import numpy as np
import pytest
from bad_data import GROUPS, Case

from ray_ft.data import sources
from ray_ft.data.pack import REAL, START
from ray_ft.data.prepare import Prepared, check, prepare
from ray_ft.data.render import load_tokenizer
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError
from ray_ft.recipe import Recipe

CASES = [case for cases in GROUPS.values() for case in cases]
Prepare = Callable[[Case], Prepared]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], demo: DemoPaths, folder: Path) -> Prepare:
    def run(case: Case) -> Prepared:
        case.write(folder)
        source = {"path": str(folder), **case.source}
        recipe = make_recipe("data.max_bad_rows=1", *case.overrides, sources=[source])
        prepared = prepare(recipe, "train", demo.base, in_process)
        check(prepared, recipe, "train", prepared.rejects)
        return prepared

    return run


def documents(prepared: Prepared, folder: Path, tokenizer_of: str) -> dict[str, str]:
    """``file:line`` → text, special tokens included, of everything that is trained on."""
    tokenizer = load_tokenizer(tokenizer_of)
    found: dict[str, str] = {}
    for unit in prepared.units:
        rows = prepared.read([unit])
        for row in range(unit.rows):
            real = int(np.count_nonzero(rows.flags[row] & REAL))
            starts = np.flatnonzero(rows.flags[row][:real] & START).tolist()
            names = prepared.names(unit, row)
            for name, start, stop in zip(names, starts, [*starts[1:], real], strict=True):
                ids = rows.input_ids[row, start:stop].tolist()
                assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
                name = name.removeprefix(f"{folder}/")
                assert name not in found
                found[name] = tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
    return found


def values(folder: Path, name: str) -> object:
    """All that is read of one row."""
    file_name, _, line = name.rpartition(":")
    (file,) = sources.find_files(sources_of(folder / file_name))
    rows = [row for chunk in sources.chunks_of(file, 0) for row in sources.read_rows(chunk)]
    return rows[int(line) - 1].content


def sources_of(path: Path):  # type: ignore[no-untyped-def]
    from ray_ft.recipe import TextSource

    return TextSource(format="text", path=str(path))


def outcome(case: Case, chunk_bytes: int | None = None) -> object:
    return pytest.param(case, chunk_bytes, id=case.name + (f" in chunks of {chunk_bytes}" if chunk_bytes else ""))


@pytest.mark.parametrize(
    ("case", "chunk_bytes"),
    [outcome(case) for case in CASES] + [outcome(case, 37) for case in CASES if not case.big],
)
def test_what_becomes_of_it(
    case: Case, chunk_bytes: int | None, run: Prepare, folder: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk_bytes:
        monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
    if case.refused:
        with pytest.raises(DataError) as caught:
            run(case)
        file = folder / next(iter(case.files))
        begins = case.refused.format(FILE=f"{file} ({file.stat().st_size} bytes)", PATH=file)
        assert caught.value.what.startswith(begins), caught.value.what
        assert caught.value.ways_out[0] == case.way_out
        return
    prepared = run(case)
    counts = prepared.counts
    assert documents(prepared, folder, demo.base) == case.used
    rejects = [json.loads(text) for text in Path(prepared.rejects).read_text().splitlines()]
    found = {f"{Path(reject['file']).relative_to(folder)}:{reject['line']}": reject["reason"] for reject in rejects}
    assert found == case.rejects and len(rejects) == len(found)
    assert all(len(reject["detail"]) < 500 for reject in rejects)
    assert counts.rows == counts.used + counts.rejected.total() == len(case.used) + len(case.rejects)
    assert counts.duplicates == case.duplicates
    for name, content in case.values.items():
        assert repr(values(folder, name)) == repr(content)  # by repr: 1 == 1.0 == True
    for name in [*case.used, *case.rejects]:
        assert name.rpartition(":")[0] in case.files


def test_the_documentation_is_made_from_these_cases() -> None:
    assert bad_data.DOCS.read_text() == bad_data.document(), "run python tests/unit/bad_data.py"
