"""A YAML file and overrides to a checked recipe; every fault is named with its way out."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from ray_ft import credentials, paths
from ray_ft.errors import RecipeError
from ray_ft.recipe.data import AnySource
from ray_ft.recipe.recipe import Recipe
from ray_ft.recipe.section import Section
from ray_ft.recipe.train import FORMS


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key.path=value`` overrides.

    Args:
        path: a YAML file (a path or URI).
        overrides: each ``key.path=value``; the value is read as YAML. List items by index: ``data.train.0.path=…``.

    Raises:
        RecipeError: with every fault found, not only the first.
    """
    if not paths.exists(path):
        raise RecipeError(f"no recipe at {path!r}", _nearby_recipes(path))
    try:
        content = yaml.load(paths.read_text(path), _Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", ["give the path of a YAML file in UTF-8"]) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{path} is not valid YAML: {error}", ["indent with spaces; quote values that hold ': '"]
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds {type(content).__name__}, not sections", ["begin with run:, model:, data:"])
    for override in overrides:
        apply_override(content, override)
    return parse(content, where=path)


def parse(content: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Check a dictionary; `where` names its origin in errors.

    Raises:
        RecipeError: with every fault found; also where a setting holds a credential, which would be kept in the run.
    """
    _refuse_credentials(content, where)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        faults = [_fault(item) for item in error.errors()]
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise RecipeError(f"{count} in {where}", faults) from error


def _refuse_credentials(content: dict[str, Any], where: str) -> None:
    """A recipe is kept in the run, its manifest and its report, and is sent to every node. Says keys, no values."""
    if found := sorted(key for key, text in _texts(content) if credentials.redacted(text) != text):
        raise RecipeError(
            f"{where} holds credentials, in {', '.join(found)}",
            [
                "leave them out of the URI or value: storage and hub clients find them in the environment of each node",
                "give each variable (HF_TOKEN …) as a file of its name in ~/.ray-ft/secrets of every node, mode 600",
                "let the machines have a role (instance profile, workload identity): docs/security.md",
            ],
        )


def _texts(content: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """(Path of the key, text) of every text of a recipe."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _texts(value, f"{key}.{name}" if key else str(name))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for completion in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


class _Loader(yaml.SafeLoader):
    """YAML as it should be: a key that stands twice is an error, and 1e-4 and 1.0e5 are numbers (YAML 1.1 wants 1.0e-4
    and 1.0e+5)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value`` in a recipe that is still a dictionary.

    Raises:
        RecipeError: it is not of that form, or its path leads nowhere.
    """
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"override {override!r} is not of the form key.path=value", ["for example train.workers=4"])
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of override {override!r} is not valid YAML: {error}", ["quote it"]) from error
    *parents, last = key.split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        try:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        except (ValueError, IndexError):
            node = None
        if not isinstance(node, dict | list):
            at = ".".join(parents[: depth + 1])
            raise RecipeError(f"override {override!r}: {at} is not a section of the recipe", ["check the key's path"])
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(
                f"override {override!r}: {'.'.join(parents)} is a list of {len(node)}",
                [f"use an index 0…{len(node) - 1}"],
            )
        node[int(last)] = value
    else:
        node[last] = value


def _fault(item: Any) -> str:
    """One line of an error: the key, what is wrong, the value, the ways out."""
    formats = [get_args(source.model_fields["format"].annotation)[0] for source in get_args(get_args(AnySource)[0])]
    # pydantic puts the chosen format into the location, right behind the source's index, and the form of a value.
    parts = [part for part in item["loc"] if part not in FORMS]
    location = [str(p) for at, p in enumerate(parts) if not (at and isinstance(parts[at - 1], int) and p in formats)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = sorted(_keys(Recipe, item["loc"][:-1]))
        elsewhere = [path for path in _all_keys(Recipe) if path.split(".")[-1] == location[-1]]
        near = elsewhere or difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{key}: missing"
    if item["type"] == "union_tag_not_found":
        return f"{key}: no format; one of {', '.join(formats)}"
    if item["type"] == "union_tag_invalid":
        near = difflib.get_close_matches(str(item["ctx"]["tag"]), formats, n=1, cutoff=0.3)
        return f"{key}.format: {item['ctx']['tag']!r} is unknown; one of {', '.join(formats)}" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
    message = item["msg"].removeprefix("Value error, ")
    if not key:  # a rule between sections
        return message
    return f"{key}: {message}" if item["type"] == "value_error" else f"{key} = {item['input']!r}: {message}"


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (list, dict, Union, UnionType, Annotated):
        for inner in get_args(annotation):
            yield from _sections(inner)


def _keys(section: type[Section], location: Sequence[int | str]) -> set[str]:
    """Known keys of the section at `location`."""
    candidates: list[type[Section]] = [section]
    named = False  # whether the next part is a key of a mapping's own, such as tune.space's
    for part in location:
        if isinstance(part, int) or named:
            named = False
            continue
        named = any(
            get_origin(inner) is dict
            for c in candidates
            if part in c.model_fields
            for inner in (c.model_fields[part].annotation, *get_args(c.model_fields[part].annotation))
        )
        tagged = [
            c
            for c in candidates
            if "format" in c.model_fields and part in get_args(c.model_fields["format"].annotation)
        ]
        candidates = tagged or [
            inner for c in candidates if part in c.model_fields for inner in _sections(c.model_fields[part].annotation)
        ]
    return {name for candidate in candidates for name in candidate.model_fields}


def _all_keys(section: type[Section], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _nearby_recipes(path: str) -> list[str]:
    folder = os.path.dirname(path) or "."
    found = sorted(
        name for name in (os.listdir(folder) if os.path.isdir(folder) else []) if name.endswith((".yaml", ".yml"))
    )
    near = difflib.get_close_matches(os.path.basename(path), found, n=3, cutoff=0.4) or found[:3]
    return [f"there is {os.path.join(folder, name)}" for name in near] or ["give the path of a YAML file"]
