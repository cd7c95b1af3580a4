"""The gate: every check of an export in turn, each with a name; the first that fails is the error.

A new check is a function of a `Case` with `@check("name")` in `checks/`, and its place in `checks.MODEL` or
`checks.ADAPTER`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ray_ft.errors import ExportError, RayFtError
from ray_ft.export.case import Case


class Check(Protocol):
    """Looks at one thing; returns what the manifest says of it: ``passed`` and what was measured, or ``left_out``."""

    name: str

    def __call__(self, case: Case) -> dict[str, Any]:
        """
        Raises:
            ExportError: it fails; the text begins with the check's name.
        """


class LeftOut(Exception):
    """What a check raises where it cannot be made here, with the reason."""


def check(name: str) -> Callable[[Callable[[Case], dict[str, Any]]], Check]:
    """Makes a check of a function that returns what it measured, or raises an error without the name."""

    def named(function: Callable[[Case], dict[str, Any]]) -> Check:
        @functools.wraps(function)
        def made(case: Case) -> dict[str, Any]:
            try:
                return {"passed": True, **function(case)}
            except LeftOut as reason:
                return {"left_out": str(reason)}
            except RayFtError as error:
                raise ExportError(f"check {name!r} failed: {error.what}", error.ways_out) from error

        made.name = name  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]

    return named


def examine(case: Case, checks: Sequence[Check]) -> dict[str, dict[str, Any]]:
    """Name → what was measured.

    Raises:
        ExportError: the first check that fails.
    """
    return {check.name: check(case) for check in checks}


def summary(checks: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each check, for people."""
    return [f"{name}: {_outcome(measured)}" for name, measured in checks.items()]


def _outcome(measured: dict[str, Any]) -> str:
    if "left_out" in measured:
        return f"left out: {measured['left_out']}"
    if "difference_rms" in measured:
        return f"passed, differs by {measured['difference_rms']:.1e} (≤ {measured['tolerance_rms']:.1e})"
    said = [
        f"{value:,} {(key.removesuffix('s') if value == 1 else key).replace('_', ' ')}"
        for key, value in measured.items()
        if type(value) is int
    ]
    said += [f"{key.replace('_', ' ')} {', '.join(map(str, v))}" for key, v in measured.items() if isinstance(v, list)]
    return f"passed, {', '.join(said)}" if said else "passed"
