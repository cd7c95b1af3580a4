"""Files and folders on any pyarrow filesystem.

A location is a local path or a URI (``s3://``, ``gs://``, ``file://``, or any protocol that fsspec knows). Nothing here
imports torch or ray, so that serving and the command line can read a run without loading either.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ray_ft import credentials
from ray_ft.errors import StorageError


def is_uri(location: str) -> bool:
    return "://" in location


def absolute(location: str) -> str:
    """A location that means the same on every process of this machine: URIs as they are, paths made absolute."""
    return location if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def split_query(location: str) -> tuple[str, str]:
    """What stands before the query of a URI, and the query with its question mark; "" where there is none.

    A question mark is also a glob sign; it begins a query where `name=` follows, and in http, which has no globs.
    """
    if is_uri(location):
        found = re.search(r"\?" if location.startswith(("http://", "https://")) else r"\?(?=[\w.-]+=)", location)
        if found:
            return location[: found.start()], location[found.start() :]
    return location, ""


def join(location: str, *parts: str) -> str:
    """A place below a location; a URI keeps its query, which says how the storage is reached, at the end."""
    head, query = split_query(location)
    return posixpath.join(head, *parts) + query


def add_suffix(location: str, suffix: str) -> str:
    """A place beside a location, whose name goes on with `suffix`; a URI keeps its query at the end."""
    head, query = split_query(location)
    return head + suffix + query


def parent(location: str) -> str:
    head, query = split_query(location)
    return head.rpartition("/")[0] + query


def base_name(location: str) -> str:
    return split_query(location)[0].rpartition("/")[2]


def filesystem(location: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `location` and the path on it.

    pyarrow's own filesystems first (local, s3, gs, hdfs); any other protocol through fsspec.

    Raises:
        CredentialError: as of `credentials.load`, for what is not local.
        StorageError: the protocol is unknown to both.
    """
    if not is_uri(location):
        return pafs.LocalFileSystem(), absolute(location)
    credentials.load()
    try:
        return pafs.FileSystem.from_uri(location)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError):
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(location)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"cannot open {location!r}: {error}",
                ["use a local path, s3://, gs://, or a protocol whose fsspec package is installed"],
            ) from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def exists(location: str) -> bool:
    fs, path = filesystem(location)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_dir(location: str) -> list[str]:
    """Base names in a folder, sorted; empty where it does not exist."""
    fs, path = filesystem(location)
    selector = pafs.FileSelector(path, allow_not_found=True)
    try:
        infos = fs.get_file_info(selector)
    except FileNotFoundError:  # pyarrow could not list it, then looked whether it is there: somebody had just made it
        infos = fs.get_file_info(selector)
    return sorted(info.base_name for info in infos)


def read_bytes(location: str) -> bytes:
    fs, path = filesystem(location)
    with fs.open_input_stream(path, compression=None) as stream:
        return stream.read()


def read_text(location: str) -> str:
    return read_bytes(location).decode("utf-8")


def write_bytes(location: str, content: bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new one, never half of it."""
    fs, path = filesystem(location)
    parent = posixpath.dirname(path)
    if not isinstance(fs, pafs.LocalFileSystem):  # an object store publishes an object when its upload is complete
        fs.create_dir(parent, recursive=True)
        with fs.open_output_stream(path, compression=None) as stream:
            stream.write(content)
        return
    os.makedirs(parent, exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def write_text(location: str, content: str) -> None:
    write_bytes(location, content.encode("utf-8"))


def write_json(location: str, content: Any) -> None:
    write_text(location, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(location: str) -> Any:
    return json.loads(read_bytes(location))


def delete_file(location: str) -> None:
    """Raises FileNotFoundError where there is none; S3 does not tell."""
    fs, path = filesystem(location)
    fs.delete_file(path)


def delete_dir(location: str) -> None:
    """Delete a folder with all that is in it, if it is there.

    Raises:
        OSError: it could not be; also where it is a symbolic link, as what that points to lies elsewhere.
    """
    fs, path = filesystem(location)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(fs, pafs.LocalFileSystem):
            shutil.rmtree(path)  # follows no link, where pyarrow's follows the first
        else:
            fs.delete_dir(path)


def move(source: str, target: str) -> None:
    """Rename a file or folder within one filesystem, replacing what was at `target`."""
    fs, old = filesystem(source)
    _, new = filesystem(target)
    if fs.get_file_info(new).type == pafs.FileType.Directory:
        fs.delete_dir(new)
    if isinstance(fs, pafs.LocalFileSystem):
        os.replace(old, new)
        return
    if fs.get_file_info(old).type == pafs.FileType.File:
        fs.move(old, new)
        return
    for info in fs.get_file_info(pafs.FileSelector(old, recursive=True)):  # object stores have no folder rename
        if info.type == pafs.FileType.File:
            fs.move(info.path, posixpath.join(new, posixpath.relpath(info.path, old)))
    with contextlib.suppress(FileNotFoundError):
        fs.delete_dir(old)


def upload_dir(folder: str | Path, location: str) -> None:
    """Copy a local folder to `location`, file by file, keeping what is already there."""
    fs, path = filesystem(location)
    fs.create_dir(path, recursive=True)
    pafs.copy_files(str(folder), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


def local_copy(location: str, cache: str | Path | None = None, *, leave_out: tuple[str, ...] = ()) -> str:
    """A local folder with the content of `location`: itself when local, else a download kept per machine and content.

    Processes of one machine may ask at once: one downloads, the others wait for it.

    Args:
        leave_out: patterns of file names that are not downloaded.
    """
    fs, path = filesystem(location)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    infos = [i for i in infos if i.type == pafs.FileType.File]
    wanted = [i for i in infos if not any(fnmatch.fnmatchcase(i.base_name, pattern) for pattern in leave_out)]
    # Of what is copied alone: copies that leave different files out lie apart.
    stamp = sorted((i.path, i.size, i.mtime_ns) for i in wanted)
    key = hashlib.sha256(repr((location, stamp)).encode()).hexdigest()[:16]
    root = Path(cache or os.environ.get("RAY_FT_CACHE") or Path.home() / ".cache" / "ray_ft")
    target = root / key
    if target.exists():
        return str(target)
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:  # stays: whoever deleted it would unlock those that wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return str(target)
        beside = tempfile.mkdtemp(dir=root)
        to_local: dict[str, Any] = {"source_filesystem": fs, "destination_filesystem": pafs.LocalFileSystem()}
        try:
            if len(wanted) == len(infos):
                pafs.copy_files(path, beside, **to_local)
            else:
                for info in wanted:
                    file = Path(beside, posixpath.relpath(info.path, path))
                    file.parent.mkdir(parents=True, exist_ok=True)
                    pafs.copy_files(info.path, str(file), **to_local)
            os.rename(beside, target)
        except OSError:
            if not target.exists():  # from another machine, where a shared cache does not share its locks
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return str(target)


def probe_writable(location: str) -> None:
    """Write, read back and delete a small file.

    Raises:
        StorageError: the location does not take or return it.
    """
    name = join(location, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(name, b"ray-ft")
        if read_bytes(name) != b"ray-ft":
            raise OSError("what was written did not come back")
        fs, path = filesystem(name)
        fs.delete_file(path)
    except OSError as error:
        raise StorageError(
            f"run.storage {location!r} is not writable: {error}",
            [
                "check the path, its permissions and the free space",
                "for s3:// or gs:// check the credentials in the environment of every node",
                "choose another place with run.storage=…",
            ],
        ) from error


class Appender:
    """Collects a file piece by piece in bounded memory; it appears at `location` when the block ends without error."""

    def __init__(self, location: str) -> None:
        self._fs, self._path = filesystem(location)
        self._location = location

    def __enter__(self) -> Appender:
        self._fs.create_dir(posixpath.dirname(self._path), recursive=True)
        self._partial = add_suffix(self._location, f".{uuid.uuid4().hex[:8]}.partial")
        _, path = filesystem(self._partial)
        self._stream = self._fs.open_output_stream(path, compression=None)
        return self

    def write(self, content: bytes) -> None:
        self._stream.write(content)

    def write_file(self, location: str) -> None:
        """Append another file's content, block by block."""
        fs, path = filesystem(location)
        with fs.open_input_stream(path, compression=None) as source:
            while block := source.read(1 << 20):
                self._stream.write(block)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        if kind is None:
            move(self._partial, self._location)
        else:
            fs, path = filesystem(self._partial)
            fs.delete_file(path)
