"""Dotted keys of a recipe that is a dictionary: read, set, and tried against the recipe's own checks."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from ray_ft import recipe as recipes
from ray_ft.errors import RecipeError

#: Keys that a sweep may not search, and why.
FIXED = {
    "run.name": "each trial has a name of its own below the sweep's",
    "run.storage": "all trials lie in the sweep's folder",
    "data.eval": "trials are compared on the same held-out rows",
    "train.eval_every": "trials are compared at the same shares of a run",
    "evaluate": "trials are compared by tune.metric",
    "serve": "it is read after training",
    "tune": "it describes the sweep itself",
}


def fixed(key: str) -> str | None:
    """Why a key may not be searched, with the way out; None where it may."""
    for one, why in FIXED.items():
        if key == one or key.startswith(one + "."):
            return f"{one} may not be searched: {why}; set it in the recipe"
        if one.startswith(key + "."):
            return f"holds {one}, which may not be searched ({why}); name the keys in it that you want"
    return None


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a recipe that is a dictionary; list items by index. What is not known there is added.

    Raises:
        RecipeError: the key lies in nothing that holds keys.
    """
    *parents, last = key.split(".")
    node: Any = content
    for depth, part in enumerate([*parents, last]):
        at = ".".join(key.split(".")[:depth])
        if node is None:
            raise RecipeError(
                f"{at} is null, so that it has no {part}",
                [f"set {at} in the recipe, or search {at} above and add when: {at}"],
            )
        if not isinstance(node, dict | list):
            raise RecipeError(f"{at} is no section but {node!r}", ["check the key's path"])
        if isinstance(node, list) and not (part.isdigit() and int(part) < len(node)):
            raise RecipeError(f"{at} is a list of {len(node)}, and has no {part!r}", [f"use 0…{len(node) - 1}"])
        place: Any = int(part) if isinstance(node, list) else part
        if depth == len(parents):
            node[place] = copy.deepcopy(value)
        else:
            node = node[place] if isinstance(node, list) else node.setdefault(place, {})


def look(content: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """(whether a dotted key is there, its value)."""
    node: Any = content
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return False, None
    return True, node


def changed(content: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the recipe with one key set."""
    copied = copy.deepcopy(dict(content))
    put(copied, key, value)
    return copied


def refused(content: Mapping[str, Any], key: str, value: Any) -> list[str]:
    """What the recipe says against this value for this key, by itself; rules between sections are left out."""
    try:
        recipes.parse(changed(content, key, value))
    except RecipeError as error:
        return [line for line in error.ways_out if _about(line, key)]
    return []


def unknown(content: Mapping[str, Any], key: str) -> str | None:
    """What is wrong with a key that the recipe does not have, the nearest one named; None where it does."""
    if look(content, key)[0]:
        return None
    try:
        tried = changed(content, key, None)
    except RecipeError as error:
        return as_line(error)
    try:
        recipes.parse(tried)
    except RecipeError as error:
        return next((line for line in error.ways_out if _about(line, key) and ": unknown key" in line), None)
    return None


def as_line(error: RecipeError) -> str:
    """An error with its ways out, as one of several faults."""
    return f"{error.what}; {', or '.join(error.ways_out)}"


def _about(line: str, key: str) -> bool:
    """Whether a fault of a recipe, which begins with its key, is about this key or one above or below it."""
    named = re.match(r"[^\s:=]+", line)
    if named is None:
        return False
    at = named[0]
    return at == key or at.startswith(key + ".") or (": unknown key" in line and key.startswith(at + "."))
