"""The collector of cycles is held back within, and is as it was afterwards."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from ray_ft import collector


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


def test_it_is_held_back_within() -> None:
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_raises_gives_it_back() -> None:
    with pytest.raises(KeyError), collector.paused():
        raise KeyError
    assert gc.isenabled()


def test_the_outermost_gives_it_back() -> None:
    with collector.paused():
        with collector.paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    with collector.paused():
        pass
    assert not gc.isenabled()


def test_a_thread_does_not_end_the_pause_of_another() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collector.paused():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert inside.wait(60)
        with collector.paused():
            pass
        assert not gc.isenabled()
    finally:
        leave.set()
        thread.join(60)
    assert gc.isenabled()


def test_as_a_decorator_it_pauses_each_call() -> None:
    @collector.paused()
    def seen() -> bool:
        return gc.isenabled()

    assert [seen(), seen()] == [False, False]
    assert gc.isenabled()
