"""Property tests see the same examples whatever was imported before, so that one commit passes or fails for all."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def same() -> Iterator[None]:
    """Also where others are hunted for."""
    before = settings.get_current_profile_name()
    settings.load_profile("same")
    yield
    settings.load_profile(before)


def examples() -> list[int]:
    seen: list[int] = []

    @given(st.integers(0, 10_000))
    def look(number: int) -> None:
        seen.append(number)

    look()
    return seen


def test_examples_do_not_depend_on_the_modules_that_are_loaded(
    same: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = examples()
    (tmp_path / "loaded_later.py").write_text(f"NUMBERS = {list(range(200, 1000))}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("loaded_later")
    assert examples() == first
