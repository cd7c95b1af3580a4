"""Requests to storage, counted: what an object store would answer one after the other, however fast this disk is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

from ray_ft import paths

#: Each is one request or more of an object store; a listing counts as one, as it does up to 1,000 names.
KINDS = (
    "exists",
    "list_dir",
    "read_bytes",
    "write_bytes",
    "delete_file",
    "delete_dir",
)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts calls of `ray_ft.paths` while the block runs; other ways to storage are not seen."""
    found: Counter[str] = Counter()

    def counting(name: str) -> object:
        real = getattr(paths, name)

        def call(*args: object, **options: object) -> object:
            found[name] += 1
            return real(*args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in KINDS:
            stack.enter_context(mock.patch.object(paths, name, counting(name)))
        yield found
