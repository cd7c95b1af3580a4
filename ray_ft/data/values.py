"""Values of a row, each checked by itself: texts, labels, and the messages of a conversation."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from ray_ft.data.lines import Reject

KNOWN = 20  # labels that a reject names
ROLES = ("system", "user", "assistant")
LOST = ("function_call", "reasoning_content", "thinking")  # keys of a message with content that no turn here carries

_repr = reprlib.Repr()  # of values of any size and depth, which plain repr would hold whole, or not survive
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlevel = 3
shown = _repr.repr


class Unusable(Exception):
    """No sample can be made of a row; `reject` says why."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reject = Reject(reason, detail)


def _value(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise Unusable(f"missing field {field!r}", f"the row has {', '.join(map(shown, list(row)[:8])) or 'no fields'}")
    return row[field]


def text_in(row: dict[str, Any], field: str, *, empty_ok: bool = False) -> str:
    """The text in a column, as it is.

    Raises:
        Unusable: there is none, or it is no text that UTF-8 can hold.
    """
    value = _value(row, field)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise Unusable(f"field {field!r} is {kind}, not a string", shown(value))
    if not empty_ok and not value.strip():
        raise Unusable(f"field {field!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable(f"field {field!r} holds a lone surrogate", "half of a UTF-16 pair; not text") from None
    return value


def label_in(row: dict[str, Any], field: str, labels: Sequence[str]) -> int:
    """The number of a label that a row gives by name or by number. A name goes first: it may look like a number.

    Raises:
        Unusable: it is none of the labels.
    """
    value = _value(row, field)
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if type(value) is int and 0 <= value < len(labels):
        return value
    if value is None or type(value) not in (str, int):
        kind = "null" if value is None else type(value).__name__
        raise Unusable(f"field {field!r} is {kind}, neither a label's name nor its number", shown(value))
    some = ", ".join(f"{number} {name!r}" for number, name in enumerate(labels[:KNOWN]))
    more = f" … ({len(labels)})" if len(labels) > KNOWN else ""
    raise Unusable("unknown label", f"{shown(value)}; model.labels has {some}{more}")


def complete(turns: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """A conversation's turns, if it begins with somebody who asks and ends with an answer.

    Raises:
        Unusable: it does not.
    """
    if turns[0]["role"] == "assistant":
        raise Unusable("the first message is the assistant's", "nothing stands before it that it could answer")
    if turns[-1]["role"] != "assistant":
        raise Unusable("the last message is not the assistant's", f"it is the {turns[-1]['role']}'s")
    return turns


def messages_in(row: dict[str, Any], field: str) -> tuple[dict[str, Any], ...]:
    """The messages in a column, each checked by itself.

    Raises:
        Unusable: there are none, or one holds what a turn cannot carry.
    """
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise Unusable(f"field {field!r} is not a list of messages", shown(messages))
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise Unusable("unknown role in a message", f"{shown(role)} in message {number}; known: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise Unusable("message calls tools", f"message {number}; the calls would be lost")
        if lost := [key for key in LOST if message.get(key)]:
            raise Unusable(f"message with {lost[0]!r}", f"message {number}; it would be lost")
        if message["role"] == "assistant" and message.get("weight") not in (None, 1):
            raise Unusable("message with a weight", f"message {number}; every assistant turn is trained alike")
        turns.append({"role": message["role"], "content": _content(message)})
    return tuple(turns)


def _content(message: dict[str, Any]) -> str | list[dict[str, Any]]:
    """Text; or parts, where one is an image, of which "image" holds what `ImageReader.read` takes."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [_part(part, message.get("role")) for part in content]
        if any(part["type"] == "image" for part in parts):
            return parts
        message = {**message, "content": "".join(part["text"] for part in parts)}
    return text_in(message, "content", empty_ok=message.get("role") == "system")


def _part(part: Any, role: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text":
        return {"type": "text", "text": text_in(part, "text", empty_ok=True)}
    if kind not in ("image", "image_url"):
        raise Unusable("message part is neither text nor image", f"type {shown(kind)}")
    if role != "user":
        raise Unusable("image in a message that is not the user's", f"it is the {role}'s")
    keys = ("image_url",) if kind == "image_url" else ("image", "path", "url", "bytes")
    found = next((part[key] for key in keys if part.get(key) is not None), None)
    if found is None:
        raise Unusable("no image", f"a part of type {kind!r} holds none of {', '.join(keys)}")
    return {"type": "image", "image": found}
