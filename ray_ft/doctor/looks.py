"""The question that every node is asked: what each part sees there. Imported on the nodes, so it imports little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_ft.doctor import auth, gpus, model, network, room, versions
from ray_ft.errors import first_line

#: Parts, in the order in which they look.
PARTS: dict[str, Callable[[], Any]] = {
    "versions": versions.look,
    "room": room.look,
    "auth": auth.look,
    "network": network.look,
    "gpus": gpus.look,
}


def look(model_path: str | None) -> dict[str, dict[str, Any]]:
    """All parts, on one node: {part: {"facts": …} or {"failed": why}}. One that fails hides no other.

    Args:
        model_path: look for this model too.
    """
    said: dict[str, dict[str, Any]] = {}
    parts = PARTS if model_path is None else {**PARTS, "model": lambda: model.look(model_path)}
    for part, question in parts.items():
        try:
            said[part] = {"facts": question()}
        except Exception as error:  # becomes a finding of whoever asked
            said[part] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    return said
