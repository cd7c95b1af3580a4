"""Expressions of a space: `expr` and `when`, over the recipe as nested mappings.

Jinja's expression syntax in its sandbox, without its random and its text functions: the same recipe always gives the
same value. Names are the recipe's sections; what is not there is an error, never empty text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ray_ft.errors import RecipeError, first_line

FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "int": int, "float": float}

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
_ENVIRONMENT.globals = dict(FUNCTIONS)
_ENVIRONMENT.filters = {name: made for name, made in _ENVIRONMENT.filters.items() if name != "random"}


class Expression:
    """A compiled expression.

    Raises:
        RecipeError: it does not parse.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._run = _ENVIRONMENT.compile_expression(text, undefined_to_none=False)
            self._tree = _ENVIRONMENT.parse("{{ (" + text + ") }}")
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"{text!r} is no expression: {first_line(error)}",
                ["for example 2 * model.adapter.rank, or train.optimizer.name == 'adamw'; texts stand in quotes"],
            ) from error

    def __call__(self, content: Mapping[str, Any]) -> Any:
        """Its value: a number, text, list, mapping or None.

        Raises:
            RecipeError: it uses what the recipe does not have, or cannot be computed.
        """
        ways = ["correct it", "add a condition (when) that leaves this case out"]
        try:
            value = self._run(**content)
            if isinstance(value, jinja2.Undefined):
                value._fail_with_undefined_error()
        except Exception as error:  # whatever Python's operators raise on what a person wrote
            raise RecipeError(f"{self.text!r} cannot be computed: {first_line(error)}", ways) from error
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            what = f"a {type(value).__name__}" if not isinstance(value, float) else str(value)
            raise RecipeError(f"{self.text!r} gives {what}, which no key of a recipe takes", ways) from error
        return value

    def names(self) -> list[str]:
        """Dotted names of the recipe that it reads, in the order written; functions left out."""
        found = list(dict.fromkeys(".".join(parts) for parts in _read(self._tree)))
        return [name for name in found if name not in FUNCTIONS]


def _read(node: nodes.Node) -> Iterator[list[str]]:
    """The longest dotted names below a node of the syntax tree."""
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        # A method of a value, as in train.optimizer.name.startswith('adam'): what is read is the value.
        for inner in (node.node.node, *node.args, *node.kwargs):
            yield from _read(inner)
        return
    parts = _dotted(node)
    if parts is not None:
        yield parts
        return
    for inner in node.iter_child_nodes():
        yield from _read(inner)


def _dotted(node: nodes.Node) -> list[str] | None:
    if isinstance(node, nodes.Name):
        return [node.name]
    if isinstance(node, nodes.Getattr):
        last: object = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        last = node.arg.value
    else:
        return None
    parents = _dotted(node.node)
    return None if parents is None else [*parents, str(last)]
