"""Credentials in a URI open files and are never shown."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from ray_ft import paths
from ray_ft.data import sources
from ray_ft.data.files import public_name, without_secrets
from ray_ft.data.prepare import prepare
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError, RayFtError, StorageError
from ray_ft.recipe import Recipe, TextSource

SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/data/a b?.jsonl", "/data/a b?.jsonl"),
        ("/data/user@host:1/x?a=b", "/data/user@host:1/x?a=b"),  # a local path has neither
        ("s3://bucket/a/*.jsonl", "s3://bucket/a/*.jsonl"),
        ("s3://bucket/a/part-?.jsonl", "s3://bucket/a/part-?.jsonl"),
        ("s3://bucket/who@where/a.jsonl", "s3://bucket/who@where/a.jsonl"),
        (f"s3://key:{SECRET}@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        (f"s3://key:{SECRET}/with/slash@bucket/who@where", "s3://bucket/who@where"),
        (f"s3://bucket/a.jsonl?access_key=a&secret_key={SECRET}", "s3://bucket/a.jsonl"),
        (f"s3://key:{SECRET}@bucket/?.jsonl?region=x&scheme=http", "s3://bucket/?.jsonl"),
        (f"https://{SECRET}@host:8080/a.parquet?X-Amz-Signature={SECRET}", "https://host:8080/a.parquet"),
        ("http://host:8080/who@where", "http://host:8080/who@where"),
        (f"hdfs://user:{SECRET}@host:9000/a", "hdfs://host:9000/a"),
        (f"simplecache::s3://key:{SECRET}@bucket/a", "simplecache::s3://bucket/a"),
    ],
)
def test_the_public_name_of_a_uri_is_without_user_info_and_query(uri: str, name: str) -> None:
    assert public_name(uri) == name
    assert without_secrets(f"cannot open {uri!r}: no", uri) == f"cannot open {name!r}: no"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that any s3:// URI means which brings the secret; opening one without it fails."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    own = paths.filesystem

    def filesystem(location: str) -> tuple[pafs.FileSystem, str]:
        if not location.startswith("s3://"):
            return own(location)
        if SECRET not in location:
            raise StorageError(f"access denied: {location}")
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket" + public_name(location)[11:]

    monkeypatch.setattr(paths, "filesystem", filesystem)
    return folder


URI = f"s3://key:{SECRET}@bucket/{{}}?region=here&secret_key={SECRET}"


def reading(recipe: Recipe, uri: str) -> Recipe:
    """The recipe with other data, past the check that refuses credentials in recipes: this is the line behind it."""
    changed = recipe.data.model_copy(update={"train": [TextSource(format="text", path=uri)]})
    return recipe.model_copy(update={"data": changed})


def test_nothing_that_is_written_or_shown_holds_the_credentials(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, bucket: Path
) -> None:
    rows = [b'{"text": "a"}', b"{", b'{"text": 1}', b'{"text": "b"}']
    (bucket / "a.jsonl").write_bytes(b"\n".join(rows))
    pq.write_table(pa.table({"text": ["c", None]}), bucket / "b.parquet")
    recipe = reading(make_recipe("data.max_bad_rows=1"), URI.format("*"))
    prepared = prepare(recipe, "train", demo.base, in_process)
    assert prepared.counts.rows == prepared.counts.used + prepared.counts.rejected.total()
    names = {name for unit in prepared.units for row in range(unit.rows) for name in prepared.names(unit, row)}
    assert "s3://bucket/b.parquet:1" in names
    assert {json.loads(line)["file"] for line in Path(prepared.rejects).read_text().splitlines()} == {
        "s3://bucket/a.jsonl",
        "s3://bucket/b.parquet",
    }
    written = [file for file in Path(recipe.run.storage).rglob("*") if file.is_file()]
    assert len(written) >= 3
    for file in written:
        assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in "\n".join([*names, prepared.summary(), json.dumps(prepared.stats()), str(prepared.origins)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.jsonl", None),
        ("a.txt", b""),
        ("a.parquet", b"x"),
        ("other.parquet", "column"),
        ("a.jsonl.gz", b"\x1f\x8b"),
        ("a.jsonl", b"PAR1"),
    ],
)
def test_no_error_holds_the_credentials(
    make_recipe: Callable[..., Recipe], demo: DemoPaths, bucket: Path, name: str, content: bytes | str | None
) -> None:
    if isinstance(content, str):
        pq.write_table(pa.table({content: ["a"]}), bucket / name)
    elif content is not None:
        (bucket / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(reading(make_recipe(), URI.format(name)), "train", demo.base, in_process)
    assert f"s3://bucket/{name}" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_changed_is_said_without_credentials(bucket: Path) -> None:
    (bucket / "a.jsonl").write_bytes(b'{"text": "a"}')
    (file,) = sources.find_files(TextSource(format="text", path=URI.format("a.jsonl")))
    (bucket / "a.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl has 0 bytes") as caught:
        list(sources.read_rows(sources.chunks_of(file, 0)[0]))
    assert SECRET not in str(caught.value)


def test_a_path_named_twice_is_said_without_credentials(bucket: Path) -> None:
    (bucket / "a.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match="named twice") as caught:
        sources.find_files(TextSource(format="text", path=[URI.format("a.jsonl")] * 2))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("location", [f"nosuch://key:{SECRET}@bucket/a.jsonl", f"s3://key:{SECRET}/x@ bucket/a.jsonl"])
def test_an_error_of_the_filesystem_is_shown_without_credentials(location: str) -> None:
    with pytest.raises(StorageError) as caught:
        sources.find_files(TextSource(format="text", path=location))
    error: RayFtError = caught.value
    assert public_name(location) in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))
