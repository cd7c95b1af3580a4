"""Files on any storage: whole or not there, in a folder as on S3, and errors that name the place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from ray_ft import artifacts, hub, paths
from ray_ft.artifacts import Manifest, RunDir
from ray_ft.data import sources
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError, ServeError, StorageError
from ray_ft.paths import Appender
from ray_ft.recipe import Recipe, TextSource

BUCKET = "ray-ft-test"


def folders(cache: Path) -> list[Path]:
    """What a cache holds besides its locks."""
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


@dataclass(frozen=True)
class S3:
    """A place in a bucket, and the client with which tests look at it past `paths`."""

    root: str
    client: Any

    def objects(self) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket. AWS_ENDPOINT_URL is the variable by which pyarrow, fsspec and boto3 find another server."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield S3(f"s3://{BUCKET}", client)
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture(params=["local", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on each kind of storage."""
    if request.param == "s3":
        yield request.getfixturevalue("s3").root + "/deep"
    elif request.param == "memory":
        import fsspec

        yield "memory://ray-ft-paths"
        memory = fsspec.filesystem("memory")
        if memory.exists("/ray-ft-paths"):
            memory.rm("/ray-ft-paths", recursive=True)
    else:
        yield str(tmp_path / "deep") if request.param == "local" else f"file://{tmp_path}/deep"


# ------------------------------------------------------------------------------------------------------- locations


def test_a_path_is_made_absolute_and_a_uri_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    assert paths.absolute("a/../b") == f"{tmp_path}/b"
    assert paths.absolute("~/a") == "/somebody/a"
    assert paths.absolute("s3://bucket/a") == "s3://bucket/a"


def test_an_unknown_protocol_names_the_location() -> None:
    with pytest.raises(StorageError, match="nosuch://a"):
        paths.filesystem("nosuch://a")


def test_a_run_keeps_its_layout() -> None:
    run = RunDir("s3://bucket/runs/one")
    assert run.recipe == "s3://bucket/runs/one/recipe.yaml"
    assert run.rejects == "s3://bucket/runs/one/data/rejects.jsonl"
    assert run.evaluation == "s3://bucket/runs/one/eval/report.json"
    assert len({run.stats, run.checkpoints, run.metrics, run.tensorboard, run.logs, run.export}) == 6


def test_a_query_stays_at_the_end_of_a_uri() -> None:
    query = "?endpoint_override=host:1/x&scheme=http"
    assert paths.join(f"s3://key:secret@bucket/runs{query}", "a", "b") == f"s3://key:secret@bucket/runs/a/b{query}"
    assert paths.add_suffix(f"s3://bucket/a{query}", ".partial") == f"s3://bucket/a.partial{query}"
    assert RunDir(f"s3://bucket/runs/one{query}").rejects == f"s3://bucket/runs/one/data/rejects.jsonl{query}"
    assert paths.split_query("https://host/a.parquet?token") == ("https://host/a.parquet", "?token")
    for without in ("/data/a?x=b", "s3://bucket/part-?.jsonl"):  # a name of a local file, a glob
        assert paths.split_query(without) == (without, "")


# ----------------------------------------------------------------------------------------------- any kind of storage


def test_what_is_written_comes_back(place: str) -> None:
    file = paths.join(place, "x", "a.txt")
    assert not paths.exists(file)
    paths.write_text(file, "é\r\n")
    assert paths.exists(file) and paths.exists(paths.join(place, "x"))
    assert paths.read_bytes(file) == "é\r\n".encode() and paths.read_text(file) == "é\r\n"
    paths.write_bytes(file, b"")
    assert paths.read_bytes(file) == b""
    content = {"a": [1, None, "é"]}
    paths.write_json(paths.join(place, "a.json"), content)
    assert paths.read_json(paths.join(place, "a.json")) == content
    assert paths.list_dir(place) == ["a.json", "x"]


def test_a_compressed_name_does_not_change_the_bytes(place: str) -> None:
    """pyarrow would compress by the suffix."""
    file = paths.join(place, "a.gz")
    paths.write_bytes(file, b"plain")
    assert paths.read_bytes(file) == b"plain"
    with Appender(file) as appender:
        appender.write(b"plain too")
    assert paths.read_bytes(file) == b"plain too"


def test_what_is_not_there_is_empty_or_an_error_but_deleting_it_is_neither(place: str) -> None:
    assert paths.list_dir(paths.join(place, "none")) == []
    paths.delete_dir(paths.join(place, "none"))
    with pytest.raises(FileNotFoundError):
        paths.read_bytes(paths.join(place, "none"))


def test_a_folder_can_be_deleted(place: str) -> None:
    paths.write_text(paths.join(place, "x", "y", "a"), "a")
    paths.write_text(paths.join(place, "b"), "b")
    paths.delete_dir(paths.join(place, "x"))
    assert not paths.exists(paths.join(place, "x", "y", "a")) and paths.list_dir(place) == ["b"]


def test_an_appended_file_appears_at_the_end_and_whole(place: str) -> None:
    file = paths.join(place, "x", "rejects.jsonl")
    with Appender(file) as appender:
        appender.write(b"1\n")
        assert not paths.exists(file)
        appender.write(b"2\n")
    assert paths.read_bytes(file) == b"1\n2\n"
    assert paths.list_dir(paths.join(place, "x")) == ["rejects.jsonl"]


def test_an_appended_file_that_fails_leaves_what_was_there(place: str) -> None:
    file = paths.join(place, "rejects.jsonl")
    paths.write_text(file, "old")
    with pytest.raises(TypeError), Appender(file) as appender:
        appender.write([appender.write(b"new")])  # type: ignore[list-item]
    assert paths.read_text(file) == "old" and paths.list_dir(place) == ["rejects.jsonl"]


def test_moving_replaces_files_and_folders(place: str) -> None:
    def at(*parts: str) -> str:
        return paths.join(place, *parts)

    for name, content in ((("new", "a"), "new a"), (("new", "x", "b"), "new b"), (("old", "c"), "old c")):
        paths.write_text(at(*name), content)
    paths.move(at("new"), at("old"))
    assert paths.list_dir(place) == ["old"] and paths.list_dir(at("old")) == ["a", "x"]
    assert paths.read_text(at("old", "x", "b")) == "new b"
    paths.write_text(at("file"), "file")
    paths.move(at("file"), at("old", "a"))
    assert paths.read_text(at("old", "a")) == "file" and paths.list_dir(place) == ["old"]


def test_a_folder_is_uploaded_beside_what_is_there(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "sub" / "b").write_text("b")
    paths.write_text(paths.join(place, "kept"), "kept")
    paths.upload_dir(folder, place)
    assert paths.list_dir(place) == ["a", "kept", "sub"]
    assert paths.read_text(paths.join(place, "sub", "b")) == "b"


def test_a_writable_place_is_left_as_it_was(place: str) -> None:
    paths.write_text(paths.join(place, "a"), "a")
    paths.probe_writable(place)
    assert paths.list_dir(place) == ["a"]


def test_a_manifest_comes_back_from_its_folder_and_from_its_run(place: str) -> None:
    content = {"format": artifacts.MANIFEST_FORMAT, "run": "one", "model": {"dtype": "float32"}, "serve": {"port": 1}}
    Manifest(paths.join(place, "export"), content).save()
    for location in (place, paths.join(place, "export")):
        manifest = Manifest.load(location)
        assert manifest.content == content and manifest.folder == paths.join(place, "export")
        assert (manifest.run, manifest.model, manifest.serve) == ("one", {"dtype": "float32"}, {"port": 1})


# ----------------------------------------------------------------------------------------------------------- local


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    paths.write_text(str(file), "old")

    def full(_: int) -> None:
        assert file.read_text() == "old"  # the new content lies beside
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            paths.write_text(str(file), "new")
    assert file.read_text() == "old" and paths.list_dir(str(tmp_path)) == ["a"]
    paths.write_text(str(file), "newer")
    assert file.read_text() == "newer"


@pytest.mark.parametrize("inside", ["", "/deeper/still"])
def test_a_place_that_cannot_be_written_is_named_with_ways_out(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()  # permissions would not bind root; a file for a parent does
    location = f"{tmp_path}/file{inside}"
    with pytest.raises(StorageError, match="is not writable") as caught:
        paths.probe_writable(location)
    assert location in str(caught.value) and "run.storage=" in str(caught.value)


def test_a_place_that_returns_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "read_bytes", lambda _: b"other")
    with pytest.raises(StorageError, match="did not come back"):
        paths.probe_writable(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no manifest.json"),
        (b"{", "damaged"),
        (b"\xff", "damaged"),
        (b"[1]", "damaged"),
        (b"{}", "has format None"),
        (json.dumps({"format": 99}).encode(), "has format 99"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why_and_how_to_get_one(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ServeError, match=said) as caught:
        Manifest.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "ray-ft export RUN" in str(caught.value)


def test_a_local_folder_is_its_own_copy(tmp_path: Path) -> None:
    assert paths.local_copy(str(tmp_path)) == str(tmp_path)
    assert hub.model_folder(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("location", ["/no/such/folder", "./none", "none", "a/b/c"])
def test_a_model_that_is_no_folder_and_no_hub_id_is_named(location: str) -> None:
    with pytest.raises(ModelError, match="is no folder") as caught:
        hub.model_folder(location)
    assert repr(location) in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- S3


def test_a_uri_of_s3_is_read_by_pyarrow(s3: S3) -> None:
    fs, path = paths.filesystem(f"{s3.root}/a/b")
    assert isinstance(fs, pafs.S3FileSystem) and path == f"{BUCKET}/a/b"
    paths.write_text(f"{s3.root}/a/b", "c")
    assert s3.client.get_object(Bucket=BUCKET, Key="a/b")["Body"].read() == b"c"


def test_a_bucket_that_is_not_there_is_named(s3: S3) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/run") as caught:
        paths.probe_writable("s3://no-such-bucket/run")
    assert "credentials" in str(caught.value)


def test_a_remote_folder_is_copied_once_per_content(s3: S3, tmp_path: Path) -> None:
    paths.write_text(f"{s3.root}/model/config.json", "one")
    paths.write_text(f"{s3.root}/model/sub/weights", "w")
    first = Path(paths.local_copy(f"{s3.root}/model", tmp_path))
    assert (first / "config.json").read_text() == "one" and (first / "sub" / "weights").read_text() == "w"
    (first / "config.json").write_text("touched")
    assert paths.local_copy(f"{s3.root}/model", tmp_path) == str(first)
    assert (first / "config.json").read_text() == "touched"  # not copied again
    paths.write_text(f"{s3.root}/model/config.json", "other")
    second = Path(paths.local_copy(f"{s3.root}/model", tmp_path))
    assert second != first and (second / "config.json").read_text() == "other"
    assert folders(tmp_path) == sorted([first, second])  # no half copy is left beside


def test_a_copy_that_another_machine_finished_first_is_used(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache on a shared folder whose locks do not reach other machines."""
    paths.write_text(f"{s3.root}/model/a", "a")
    original = pafs.copy_files

    def race(*args: Any, **options: Any) -> None:
        (lock,) = tmp_path.glob("*.lock")
        lock.with_suffix("").mkdir()
        (lock.with_suffix("") / "a").write_text("first")
        original(*args, **options)

    monkeypatch.setattr(pafs, "copy_files", race)
    copy = Path(paths.local_copy(f"{s3.root}/model", tmp_path))
    assert (copy / "a").read_text() == "first" and folders(tmp_path) == [copy]


def test_those_who_ask_at_once_share_one_download(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.write_text(f"{s3.root}/model/a", "a")
    original, copies = pafs.copy_files, []

    def slow(*args: Any, **options: Any) -> None:
        copies.append(args)
        time.sleep(0.5)
        original(*args, **options)

    monkeypatch.setattr(pafs, "copy_files", slow)
    with ThreadPoolExecutor(4) as pool:  # a lock of one file opened twice keeps threads apart as it does processes
        found = set(pool.map(lambda _: paths.local_copy(f"{s3.root}/model", tmp_path), range(4)))
    assert len(found) == len(copies) == 1 and folders(tmp_path) == [Path(found.pop())]


def test_a_copy_that_fails_leaves_nothing_and_can_be_tried_again(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.write_text(f"{s3.root}/model/a", "a")

    def fail(_: str, target: str, **__: Any) -> None:
        Path(target, "half").write_text("h")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(pafs, "copy_files", fail)
        with pytest.raises(OSError, match="no space left"):
            paths.local_copy(f"{s3.root}/model", tmp_path)
    assert folders(tmp_path) == []
    assert os.listdir(paths.local_copy(f"{s3.root}/model", tmp_path)) == ["a"]


def test_a_model_without_its_weights_is_a_copy_of_its_own(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_FT_CACHE", str(tmp_path))
    small = {"config.json", "model.safetensors.index.json", "sub/tokenizer.json"}
    big = {"model-1.safetensors", "pytorch_model.bin", "sub/x.gguf"}
    for name in small | big:
        paths.write_text(f"{s3.root}/model/{name}", name)

    def files(folder: str) -> set[str]:
        return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}

    without = hub.model_folder(f"{s3.root}/model", weights=False)
    assert files(without) == small and Path(without, "sub/tokenizer.json").read_text() == "sub/tokenizer.json"
    assert files(hub.model_folder(f"{s3.root}/model")) == small | big
    assert hub.model_folder(f"{s3.root}/model", weights=False) == without and files(without) == small


def test_a_remote_model_that_is_not_there_is_named(s3: S3) -> None:
    with pytest.raises(ModelError, match=f"{s3.root}/none"):
        hub.model_folder(f"{s3.root}/none")


@pytest.mark.parametrize("pattern", ["", "/", "/*.jsonl", "/**", "/a.jsonl"])
def test_data_on_s3_is_found_and_read_like_local_data(s3: S3, pattern: str) -> None:
    paths.write_text(f"{s3.root}/data/a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    (file,) = sources.find_files(TextSource(format="text", path=f"{s3.root}/data{pattern}"))
    assert file.uri == f"{s3.root}/data/a.jsonl"
    rows = [row.content for chunk in sources.chunks_of(file, 0, 5) for row in sources.read_rows(chunk)]
    assert rows == [{"text": "a"}, {"text": "b"}]


def test_data_on_s3_is_prepared_onto_s3_with_the_rows_that_it_gives_locally(
    s3: S3, make_recipe: Callable[..., Recipe], demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_ft.data.prepare import prepare

    monkeypatch.setattr(sources, "CHUNK_BYTES", 8000)
    paths.upload_dir(Path(demo.train[0]).parent, f"{s3.root}/train")
    local = prepare(make_recipe(), "train", demo.base, in_process)
    overrides = (f"run.storage={s3.root}/runs", f"data.train.0.path={s3.root}/train")
    remote = prepare(make_recipe(*overrides), "train", demo.base, in_process)
    assert remote.location.startswith(f"{s3.root}/runs/_prepared/") and remote.units == local.units
    assert remote.read(remote.units).input_ids.tolist() == local.read(local.units).input_ids.tolist()
    assert remote.names(remote.units[0], 0)[0].startswith(f"{s3.root}/train/part-0.jsonl:")
    assert prepare(make_recipe(*overrides), "train", demo.base, in_process).reused
    assert not [name for name in s3.objects() if "partial" in name]


@pytest.fixture
def query(s3: S3, server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What leads to the server once the environment does not."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    return f"?endpoint_override={server.removeprefix('http://')}&scheme=http&region=us-east-1"


def test_a_run_lies_where_the_query_of_its_storage_says(s3: S3, query: str, tmp_path: Path) -> None:
    run = RunDir(paths.join(f"{s3.root}/runs{query}", "one"))
    paths.probe_writable(run.root)
    with Appender(run.rejects) as rejects:
        rejects.write(b"{}\n")
    (tmp_path / "config.json").write_text("{}")
    paths.upload_dir(tmp_path, run.export)
    Manifest(run.export, {"format": artifacts.MANIFEST_FORMAT}).save()
    assert Manifest.load(run.root).folder == run.export
    assert sorted(k for k in s3.objects() if not k.endswith("/")) == [
        f"runs/one/{name}" for name in ("data/rejects.jsonl", "export/config.json", "export/manifest.json")
    ]
    assert paths.list_dir(run.root) == ["data", "export"]
    paths.move(run.at("data"), run.at("moved"))
    assert paths.read_text(run.at("moved", "rejects.jsonl")) == "{}\n"
    assert sorted(os.listdir(paths.local_copy(run.export, tmp_path / "cache"))) == ["config.json", "manifest.json"]


@pytest.mark.parametrize("pattern", ["", "/", "/*/a b.jsonl", "/**", "/x=1/a%20b.jsonl", "/[x]=1/?%20?.jsonl"])
@pytest.mark.parametrize("login", ["", "test:test@"])
def test_data_keeps_query_and_credentials_of_its_uri(s3: S3, query: str, pattern: str, login: str) -> None:
    s3.client.put_object(Bucket=BUCKET, Key="data/x=1/a b.jsonl", Body=b'{"text": "a"}\n')
    root = f"s3://{login}{BUCKET}/data"
    (file,) = sources.find_files(TextSource(format="text", path=f"{root}{pattern}{query}"))
    assert file.uri == f"{root}/x=1/a%20b.jsonl{query}"
    assert [row.content for chunk in sources.chunks_of(file, 0) for row in sources.read_rows(chunk)] == [{"text": "a"}]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_one_file_is_read_over_http(s3: S3, tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"row {n}"} for n in range(100)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data")
    else:
        (tmp_path / "data").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s3.client.upload_file(str(tmp_path / "data"), BUCKET, f"data{suffix}")
    url = s3.client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": f"data{suffix}"})
    (file,) = sources.find_files(TextSource(format="text", path=url))
    assert file.uri == url and "?" in url
    read = [row.content for chunk in sources.chunks_of(file, 0, 500) for row in sources.read_rows(chunk)]
    assert read == rows


def test_a_folder_that_another_process_makes_while_it_is_looked_for_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow's `allow_not_found` looks after a failed listing whether the folder is there, and fails where it is."""
    folder = tmp_path / "checkpoints"

    class Late:
        """Fails to list the folder, which is there by the time that it says so."""

        def get_file_info(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
            if not folder.exists():
                (folder / "step_1").mkdir(parents=True)
                raise FileNotFoundError(selector.base_dir)
            return pafs.LocalFileSystem().get_file_info(selector)

    monkeypatch.setattr(paths, "filesystem", lambda location: (Late(), location))
    assert paths.list_dir(str(folder)) == ["step_1"]
