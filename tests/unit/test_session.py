"""How a process that cannot be waited for ends with all below it."""

from __future__ import annotations

import os

import psutil
import pytest

from ray_ft import session


class Process:
    """A process below; one that is gone says so, whatever it is asked."""

    def __init__(self, name: str, killed: list[str]) -> None:
        self._name, self._killed = name, killed

    def name(self) -> str:
        if self._name == "gone":
            raise psutil.NoSuchProcess(1)
        return self._name

    def kill(self) -> None:
        self.name()
        self._killed.append(self._name)


def test_abandoning_ends_the_raylet_last_and_is_not_held_up_by_one_that_ends_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[str] = []
    below = [Process(name, killed) for name in ("raylet", "gone", "gcs_server", "ray::IDLE")]

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(session, "_descendants", lambda: below)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="143"):
        session.abandon(143)
    assert killed == ["gcs_server", "ray::IDLE", "raylet"]
