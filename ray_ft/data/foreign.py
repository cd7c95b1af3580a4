"""Files that are not what their name says: what a file is, told from how it begins, and how to make rows of it.

Read line by line, such a file gives one baffling reject per line, or a single one for all that it holds. It is refused
instead, by name. What is looked for stands at the beginning of a file alone; one damaged row does not look like it.
"""

from __future__ import annotations

import codecs
import json
import re

from ray_ft.data.files import File
from ray_ft.errors import DataError

HEAD_BYTES = 64 << 10  # how much of a file's beginning is looked at

# What a file begins with → what it is, and what it is named then. The last two are what failed downloads leave.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "name it .jsonl.gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "name it .jsonl.zst"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"PK\x03\x04", "a zip archive", "unpack it: unzip FILE"),
    (b"BZh", "bzip2", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "xz", "unpack it: unxz FILE"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"<!DOCTYPE html", "a web page", "download it again: the server has sent a page in its place"),
)
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_UTF = {  # byte order marks, the longer ones first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Which of the first four bytes are NUL, where the first two characters are ASCII, as those of JSON are (RFC 4627, 3).
_NULS = {(1, 3): "UTF-16LE", (0, 2): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}
# Not by jq before 1.7, nor by JavaScript: they alter long numbers.
_ARRAY = (
    "write one JSON object per line: "
    'python -c "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]" < FILE > NEW.jsonl'
)
_OBJECTS = "write one JSON object per line: jq -c . FILE > NEW.jsonl (jq 1.7 or later; older ones alter long numbers)"


def check_compression(file: File, head: bytes) -> None:
    """Refuse a file that is named .gz or .zst and is something else; what is merely damaged, decompressing finds.

    Args:
        head: the first bytes of the file, as it is stored.

    Raises:
        DataError: with what to do.
    """
    assert file.compression
    if not head or head.startswith(_COMPRESSED[file.compression][: len(head)]):
        return
    if found := _magic(head):
        raise _refused(file, *found, named=f"a {file.compression} file")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        raise _refused(file, "plain text", "take the .gz or .zst from its name", named=f"a {file.compression} file")


def check_text(file: File, head: bytes) -> None:
    """Refuse a file that does not hold lines of UTF-8 text with one JSON value each.

    Args:
        head: the first HEAD_BYTES of its content, decompressed; fewer only where it has no more.

    Raises:
        DataError: with what it is and how to convert it.
    """
    if found := _magic(head) or _encoding(head) or _layout(head):
        raise _refused(file, *found, named="JSON lines")


def _magic(head: bytes) -> tuple[str, str] | None:
    return next(((what, way) for magic, what, way in _MAGIC if head.startswith(magic)), None)


def _encoding(head: bytes) -> tuple[str, str] | None:
    for mark, name in _UTF.items():
        if head.startswith(mark) and b"\0" in head:  # its braces and quotes hold NULs; a damaged first row does not
            return name, f"convert it: iconv -f {name} -t UTF-8 FILE > NEW.jsonl"
    if not head.strip(b"\0"):
        return ("NUL bytes", "copy it again: it was never fully written") if head else None
    first = head[:4]
    name = _NULS.get(tuple(at for at, byte in enumerate(first) if not byte), "")
    if name and len(first) == 4 and first.replace(b"\0", b"")[:1] in b"{[ \t\r\n":
        return f"{name} without a byte order mark", f"convert it: iconv -f {name} -t UTF-8 FILE > NEW.jsonl"
    return None


def _layout(head: bytes) -> tuple[str, str] | None:
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line, _, rest = text.partition(b"\n")
    if b"\n" not in head and re.search(rb"\}[ \t]*\r[ \t\r]*\{", head):
        return "text whose lines end in CR alone", r"convert it: tr '\r' '\n' < FILE > NEW.jsonl"
    if text.startswith(b"[") and re.match(rb"\[\s*(\{|\]|$|\n)", text):
        try:
            json.loads(line)
            rows_are_lists = bool(rest.strip())  # a fault of each row, not of the file
        except (ValueError, RecursionError):
            rows_are_lists = False
        if not rows_are_lists:
            return "one JSON array", _ARRAY
    if re.match(rb'\{\s*\n\s*"', text):
        return "JSON written over several lines", _OBJECTS
    return None


def _refused(file: File, what: str, way: str, named: str) -> DataError:
    return DataError(
        f"{file.name} ({file.size} bytes) is {what}, where its name says {named}",
        [way, "or take it out of data.train / data.eval"],
    )
