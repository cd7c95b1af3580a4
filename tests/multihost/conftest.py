"""Whether this machine can have several hosts."""

from __future__ import annotations

import os

import pytest

from . import sshd
from .testbed import why_not

#: Set where the multi-host tests must not be skipped, as in continuous integration.
REQUIRE = "RAY_FT_REQUIRE_MULTIHOST"


@pytest.fixture(scope="session")
def multihost() -> None:
    """Skips, with the reason, where no bed can be made; fails there if `REQUIRE` is 1."""
    _need(why_not())


@pytest.fixture(scope="session")
def multihost_ssh(multihost: None) -> None:
    """The same for hosts that are reached over ssh."""
    _need(sshd.why_not())


def _need(reason: str | None) -> None:
    if reason:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, and {reason}")
        pytest.skip(reason)
