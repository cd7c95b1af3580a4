"""Places: never more than the cap, none twice, none before the other has left or is dead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ray_ft.tune import places
from ray_ft.tune.places import Places


def test_the_cap_holds_and_a_trial_never_is_in_twice() -> None:
    room = Places(2, alive=lambda actor: True)
    assert room.enter(0, "a")
    assert not room.enter(0, "b")  # its next process has to wait until this one has left the run directory
    assert room.enter(1, "c")
    assert not room.enter(2, "d")
    room.leave(0, "b")  # does not hold it
    assert not room.enter(2, "d")
    room.leave(0, "a")
    assert room.enter(2, "d")
    assert room.inside() == [1, 2]
    assert room.most() == 2


def test_the_dead_leave_and_what_their_controllers_held_is_given_back(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    given = []
    monkeypatch.setattr(places, "_give_back", lambda: given.append(True))
    dead: set[str] = set()
    room = Places(1, alive=lambda actor: actor not in dead)
    assert room.enter(0, "a")
    assert not room.enter(0, "b")
    dead.add("a")
    assert room.inside() == []
    assert not room.enter(0, "b")  # its controller may not have heard of it yet
    assert given == []
    monkeypatch.setattr(places, "SETTLE_SECONDS", 0.0)
    assert room.enter(0, "b")
    assert given == [True]


class Called:
    """An actor's methods, called here and now."""

    def __init__(self, room: Places) -> None:
        self._room = room

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._room, name))


def test_a_trial_that_is_to_end_waits_for_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "b"))
    room = Places(1, alive=lambda actor: True)
    assert room.enter(0, "a")
    with places.held(Called(room), 1, lambda: True) as entered:
        assert not entered
    room.leave(0, "a")
    with places.held(Called(room), 1, lambda: False) as entered:
        assert entered
        assert room.inside() == [1]
    assert room.inside() == []


def test_at_the_end_none_enters() -> None:
    room = Places(2, alive=lambda actor: True)
    assert room.enter(0, "a")
    room.end()
    assert room.ending()
    assert not room.enter(1, "b")
    assert room.inside() == [0]
