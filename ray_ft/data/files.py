"""Finding the files of a source: paths, folders, globs and URIs to files, each with what a listing says of it."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote

import pyarrow.fs as pafs

from ray_ft import paths
from ray_ft.errors import DataError, StorageError
from ray_ft.recipe import Source

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Up to the @ of a URI's authority. A secret may hold a slash that should have been escaped; a port is no secret.
_SECRET = re.compile("key|secret|token|sig|pass|cred|auth", re.IGNORECASE)  # in the name of a query's value
_USER_INFO = re.compile(r"://(?:[^/@]*:(?!\d*(?:/|$))[^@]*|[^/@]*)@")


@dataclass(frozen=True)
class File:
    """One input file. `stamp` identifies its content as far as a listing can: size in bytes and time of change."""

    uri: str
    kind: Literal["jsonl", "parquet"]
    compression: str | None
    size: int
    stamp: str

    @property
    def name(self) -> str:
        """What people are shown; `uri`, which opens the file, may hold credentials."""
        return public_name(self.uri)


def public_name(uri: str) -> str:
    """A location without user info and query, in which credentials stand: for reports, errors and ids of samples."""
    return _USER_INFO.sub("://", paths.split_query(uri)[0]) if paths.is_uri(uri) else uri


def without_secrets(text: str, uri: str) -> str:
    """A text, such as another library's error, with the public name in place of the URI, and without its secrets."""
    head, query = paths.split_query(uri)
    text = text.replace(uri, public_name(uri))
    secrets = [value for name, value in parse_qsl(query.removeprefix("?")) if _SECRET.search(name)]
    if paths.is_uri(uri) and (found := _USER_INFO.search(head)):
        secrets += re.split("[:/]", found[0].removeprefix("://").removesuffix("@"))
    forms = {*secrets, *map(unquote, secrets), *map(quote, secrets)}
    for secret in sorted((form for form in forms if len(form) > 3), key=len, reverse=True):  # shorter ones are words
        text = text.replace(secret, "…")
    return text


def find_files(source: Source) -> list[File]:
    """The files of a source, sorted by name within each of its paths.

    Raises:
        DataError: a path matches nothing, a file is of no known kind or size, or two paths name the same one.
    """
    files: list[File] = []
    for location in source.path:
        found = _match(location)
        if not found:
            raise DataError(
                f"data path {public_name(location)!r} matches no file",
                [
                    "check the path; a relative one starts at the folder the command runs in",
                    f"files must end in {', '.join(JSONL_SUFFIXES)} (also .gz, .zst) or .parquet",
                ],
            )
        files += found
    if twice := [uri for uri, count in Counter(file.uri for file in files).items() if count > 1]:
        raise DataError(
            f"{public_name(twice[0])} is named twice by the paths of one source, so its rows would count double",
            ["narrow the globs"],
        )
    return files


def _match(location: str) -> list[File]:
    base, pattern, query = _split_glob(location)
    local = not paths.is_uri(location) or location.startswith("file://")
    try:
        fs, path = paths.filesystem(base + query)
        # pyarrow's own filesystems undo the percent signs of a URI; fsspec takes it literally.
        escaped = paths.is_uri(location) and not isinstance(fs, pafs.PyFileSystem)

        def inner(info: pafs.FileInfo) -> str:
            return info.path.removeprefix(path).lstrip("/")

        if pattern:
            wanted = unquote(pattern) if escaped else pattern
            infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
            infos = [i for i in infos if _glob_match(inner(i), wanted)]
        else:
            info = fs.get_file_info(path)
            if info.type == pafs.FileType.File:
                return [_file(info.path if local else location, base, info)]
            infos = []
            if info.type == pafs.FileType.Directory:
                infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
                infos = [i for i in infos if _kind(i.path)[0] and not _hidden(inner(i))]
    except DataError:
        raise
    except Exception as error:  # each of fsspec's protocols has errors of its own
        # Their text may hold the credentials; and so does the traceback of a cause, in the log of a worker.
        said = without_secrets(str(error), base + query)
        raise StorageError(
            f"cannot list data path {public_name(location)!r}: {said}", ["check the URI and its credentials"]
        ) from (error if said == str(error) else None)
    files = []
    for info in sorted((i for i in infos if i.type == pafs.FileType.File), key=lambda i: i.path):
        name = quote(inner(info), safe="/!$&'()+,;=:@") if escaped else inner(info)
        # A path that the filesystem reports lacks host, credentials and query: only with these can any node open it.
        files.append(_file(info.path if local else paths.join(base + query, name), info.path, info))
    return files


def _file(uri: str, name: str, info: pafs.FileInfo) -> File:
    kind, compression = _kind(name)
    if kind is None:
        raise DataError(
            f"{public_name(uri)} is of no known kind",
            [f"name it {', '.join(JSONL_SUFFIXES)} (also .gz, .zst) or .parquet", "narrow the glob"],
        )
    if info.size is None:  # it would pass for an empty file
        raise DataError(
            f"the size of {public_name(uri)} is not known: its server does not say it", ["copy it to another storage"]
        )
    return File(uri, kind, compression, info.size, f"{info.size}-{info.mtime_ns}")


def _split_glob(location: str) -> tuple[str, str, str]:
    """(folder, pattern below it, query of the URI); without a glob sign, the location is all in the first."""
    head, query = paths.split_query(location)
    root = head[: head.index("://") + 3] if paths.is_uri(head) else ""
    if head.startswith("/", len(root)):
        root += "/"
    parts = head[len(root) :].split("/")
    first = next((n for n, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return root + "/".join(parts[:first]), "/".join(parts[first:]), query


def _glob_match(path: str, pattern: str) -> bool:
    """Like a shell: * stays within one folder, ** crosses folders, neither meets a leading dot."""

    def match(parts: list[str], wanted: list[str]) -> bool:
        if not wanted:
            return not parts
        if wanted[0] == "**" and match(parts, wanted[1:]):
            return True
        if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
            return False
        if wanted[0] == "**":
            return match(parts[1:], wanted)
        return fnmatch.fnmatchcase(parts[0], wanted[0]) and match(parts[1:], wanted[1:])

    return match(path.split("/"), pattern.split("/"))


def _hidden(inner: str) -> bool:
    """Below a folder: what tools keep for themselves (.ipynb_checkpoints/, _delta_log/, ._x.jsonl)."""
    return any(part.startswith((".", "_")) for part in inner.split("/"))


def _kind(path: str) -> tuple[Literal["jsonl", "parquet"] | None, str | None]:
    stem, suffix = posixpath.splitext(path)
    if suffix == ".parquet":
        return "parquet", None
    if suffix in COMPRESSIONS and posixpath.splitext(stem)[1] in JSONL_SUFFIXES:
        return "jsonl", COMPRESSIONS[suffix]
    return ("jsonl", None) if suffix in JSONL_SUFFIXES else (None, None)
