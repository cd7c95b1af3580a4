"""Python's collector of reference cycles, held back while many objects are made at once.

It looks at all objects that there are each time they have grown by a quarter, so what makes a hundred thousand of
them (an index parsed, an index put together) spends a third of its time or more in it, and the more the larger it is.
None of them is garbage: what is no longer referred to is freed as always, cycles alone wait.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_within = 0  # threads, and calls of one another, that hold it back
_was_on = True


@contextmanager
def paused() -> Iterator[None]:
    """Also a decorator. For work that computes, and for seconds: nothing that waits for storage belongs inside."""
    global _within, _was_on
    with _lock:
        if not _within:
            _was_on = gc.isenabled()
            gc.disable()
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within and _was_on:
                gc.enable()
