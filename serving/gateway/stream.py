"""A streamed answer on its way through: bytes pass as they came, without being parsed.

vLLM writes one event for each step of a choice, ``data: {…}`` and an empty line, at the end one with the usage and no
choice (we always ask for it), then ``data: [DONE]``. Searching an event's bytes for a few words (0.1 µs each) tells
these apart, and cannot be fooled by an answer: inside a JSON text every quote is written as ``\\"``.
"""

from __future__ import annotations

import json
import re
from typing import Any

_USAGE_ONLY = b'"choices":[],'
_ERROR = b'data: {"error"'
_END = b"\n\n"
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":(\d+)')
_ANSWER_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


def usage(body: bytes) -> tuple[int, int] | None:
    """Tokens of the prompt and of the answer, from the ``usage`` of an answer or of a chunk; None: it has none."""
    at = body.rfind(b'"usage":{')
    prompt = _PROMPT_TOKENS.search(body, at) if at >= 0 else None
    if prompt is None:
        return None
    answer = _ANSWER_TOKENS.search(body, at)
    return int(prompt[1]), int(answer[1]) if answer else 0


class Events:
    """One streamed answer.

    Args:
        names: the model's name for the engine and for the client, which are exchanged where they differ.
        show_usage: the client asked for the chunk with the usage.

    Attributes:
        count: events with a part of an answer that were passed on.
        usage: tokens of prompt and answer, once the engine said them.
        error: what the engine said where it broke off.
        done: the engine said that the answer is complete.
    """

    def __init__(self, names: tuple[str, str], show_usage: bool) -> None:
        self._rename = None if names[0] == names[1] else (model_bytes(names[0]), model_bytes(names[1]))
        self._show_usage = show_usage
        self._rest = b""
        self.count = 0
        self.usage: tuple[int, int] | None = None
        self.error: dict[str, Any] | None = None
        self.done = False

    def passed(self, data: bytes) -> bytes:
        """What the client is sent of these bytes: whole events; the beginning of one waits for its end."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(_END):
            end = data.rfind(_END) + len(_END)
            if end < len(_END):
                self._rest = data
                return b""
            data, self._rest = data[:end], data[end:]
        if self._rename is not None:
            data = data.replace(*self._rename)
        if _USAGE_ONLY in data or _ERROR in data or b"[DONE]" in data:
            return self._seldom(data)
        self.count += data.count(_END)
        return data

    def _seldom(self, data: bytes) -> bytes:
        """The same, where an event is another than a part of the answer."""
        kept = []
        for event in data.split(_END)[:-1]:
            if event == b"data: [DONE]":
                self.done = True
            elif event.startswith(_ERROR):
                self.error = _error_of(event)
                continue  # it may tell of the engine's inside; the gateway says it in its own words
            elif _USAGE_ONLY in event and (found := usage(event)) is not None:
                self.usage = found
                if not self._show_usage:
                    continue
            else:
                self.count += 1
            kept.append(event + _END)
        return b"".join(kept)


def model_bytes(name: str) -> bytes:
    """How an engine writes a model's name into an answer."""
    return f'"model":{json.dumps(name, ensure_ascii=False)}'.encode()


def _error_of(event: bytes) -> dict[str, Any]:
    try:
        error = json.loads(event.removeprefix(b"data: "))["error"]
    except (ValueError, KeyError):
        return {}
    return error if isinstance(error, dict) else {}
