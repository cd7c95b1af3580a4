"""Kinds of values that a field of a request may have: numbers in a range, texts up to a length, and so on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from serving.gateway.refusal import Refusal, shown
from serving.gateway.routes import Route
from serving.gateway.settings import Settings

#: A check takes the value, the field's name, the settings and the route; it returns nothing or raises.
Check = Callable[[Any, str, Settings, Route], None]

#: Of a JSON schema: the engine compiles it into a grammar.
SCHEMA_DEPTH, SCHEMA_NODES = 16, 1000


def wrong(name: str, value: object, rule: str) -> Refusal:
    return Refusal(400, f"{name} is {shown(value)}, and has to be {rule}", "invalid_field", name)


def unknown(name: str, table: Mapping[str, Check], where: str = "") -> Refusal:
    near = difflib.get_close_matches(name[:64], table, n=1, cutoff=0.6)
    known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(table))}"
    return Refusal(400, f"the field {where}{shown(name)} is not offered here; {known}", "unknown_field", name[:64])


def whole(low: int, high: int | Callable[[Settings, Route], int]) -> Check:
    def check(value: Any, name: str, settings: Settings, route: Route) -> None:
        most = high if isinstance(high, int) else high(settings, route)
        if type(value) is not int or not low <= value <= most:
            raise wrong(name, value, f"a whole number from {low} to {most}")

    return check


def number(low: float, high: float, above: bool = False) -> Check:
    """From low to high; `above`: low itself is not allowed."""

    def check(value: Any, name: str, settings: Settings, route: Route) -> None:
        number = type(value) in (int, float)
        if not number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise wrong(name, value, f"a number {'above' if above else 'from'} {low:g} to {high:g}")

    return check


def truth(value: Any, name: str, settings: Settings, route: Route) -> None:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")


def text(longest: int) -> Check:
    def check(value: Any, name: str, settings: Settings, route: Route) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise wrong(name, value, f"a text of at most {longest} characters")

    return check


def stops(value: Any, name: str, settings: Settings, route: Route) -> None:
    texts = value if isinstance(value, list) else [value]
    if len(texts) > 4 or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in texts):
        raise wrong(name, value, "at most 4 texts of 1 to 256 characters")


def ids(most: int) -> Check:
    def check(value: Any, name: str, settings: Settings, route: Route) -> None:
        if not isinstance(value, list) or len(value) > most or not all_ids(value):
            raise wrong(name, value, f"a list of at most {most} token ids")

    return check


def all_ids(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 31 for value in values)


def logit_bias(value: Any, name: str, settings: Settings, route: Route) -> None:
    if not isinstance(value, dict) or len(value) > 300:
        raise wrong(name, value, "an object of at most 300 token ids")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise wrong(name, key, "by token id")
        number(-100, 100)(bias, f"{name}.{key}", settings, route)


def stream_options(value: Any, name: str, settings: Settings, route: Route) -> None:
    object_of(value, name, {"include_usage": truth}, settings, route)


def object_of(value: Any, name: str, table: Mapping[str, Check], settings: Settings, route: Route) -> None:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    for key, item in value.items():
        one = table.get(key)
        if one is None:
            raise unknown(key, table, f"{name}.")
        one(item, f"{name}.{key}", settings, route)


def response_format(value: Any, name: str, settings: Settings, route: Route) -> None:
    kinds = ("text", "json_object", "json_schema")
    if not isinstance(value, dict) or value.get("type") not in kinds:
        raise wrong(name, value, f"an object with a type of {', '.join(kinds)}")
    table: dict[str, Check] = {"type": text(32)}
    if value["type"] == "json_schema":
        if not isinstance(value.get("json_schema"), dict) or "schema" not in value["json_schema"]:
            raise Refusal(400, f"{name}.json_schema.schema is missing", "missing_field", name)
        table["json_schema"] = _json_schema
    object_of(value, name, table, settings, route)


def _json_schema(value: Any, name: str, settings: Settings, route: Route) -> None:
    table = {"name": text(64), "description": text(1024), "strict": truth, "schema": _schema}
    object_of(value, name, table, settings, route)


def _schema(value: Any, name: str, settings: Settings, route: Route) -> None:
    """A schema small enough to be compiled, without expressions that take for ever."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    nodes, depth = 0, 0
    level: list[Any] = [value]
    while level:
        depth += 1
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                # A property may have this name: then its value is a schema, not a text.
                if isinstance(node.get("pattern"), str) or "patternProperties" in node:
                    raise Refusal(400, f"{name}: regular expressions are not offered", "invalid_field", name)
                below += node.values()
            elif isinstance(node, list):
                below += node
        nodes += len(level)
        if depth > SCHEMA_DEPTH or nodes > SCHEMA_NODES:
            raise Refusal(
                400, f"{name} is larger than {SCHEMA_NODES} values or {SCHEMA_DEPTH} levels", "invalid_field", name
            )
        level = below


def same(value: Any, name: str, settings: Settings, route: Route) -> None:
    """Checked before: the model's name found the route."""
