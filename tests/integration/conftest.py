"""What integration tests share: one private Ray head for all that come to a cluster from outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from head import Head


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """Three CPUs, token auth, jobs API; some 20-40 s to come up. Leave no job behind that runs."""
    with Head() as one:
        yield one
