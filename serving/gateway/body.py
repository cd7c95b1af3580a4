"""A request's body: read within a limit of bytes and time, and parsed once.

What leaves here is what Python's parser understood, and the engine is sent that, written anew: no two parsers can
understand one body differently.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from serving.gateway.exchange import Disconnected, Receive
from serving.gateway.refusal import Refusal

#: Objects and arrays in one body. A list of 1.4 million empty ones fits into 4 MiB and costs the parser a second and
#: 100 MB; 100,000 cost 40 ms.
MOST_BRACKETS = 100_000
_TOO_DEEP = "the body is nested too deeply"


async def read(receive: Receive, content_length: bytes | None, most: int, seconds: float) -> bytes:
    """The whole body.

    Args:
        content_length: the header as it came; None for a chunked body, which is counted while it arrives.
        most: bytes; a longer body is refused without reading the rest.
        seconds: within which it has to arrive.

    Raises:
        Refusal: 413, 408, or 400 for a length that is none.
        Disconnected: the client went away before its end.
    """
    if content_length is not None:
        if not content_length.isdigit():
            raise Refusal(400, "Content-Length is not a number", "invalid_length", close=True)
        if len(content_length) > 18 or int(content_length) > most:
            raise _too_large(most)
    try:
        async with asyncio.timeout(seconds):
            chunks: list[bytes] = []
            size = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > most:
                    raise _too_large(most)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s", "request_timeout", close=True) from None


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most:,} bytes, which is the most", "body_too_large", close=True)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Refusal: 400: it is not UTF-8, not JSON as of RFC 8259 (no NaN, no key twice), not an object, or nested too
            deeply.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} of the body is not UTF-8") from None
    if text.count("{") + text.count("[") > MOST_BRACKETS:
        raise _invalid(f"the body has more than {MOST_BRACKETS:,} brackets")
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise _invalid(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # an integer of more than 4,300 digits
        raise _invalid("the body has a number with too many digits") from None
    if not isinstance(content, dict):
        raise _invalid("the body is not a JSON object")
    return content


def write(content: dict[str, Any]) -> bytes:
    """A checked request as JSON for the engine.

    Raises:
        Refusal: 400: a text has a lone surrogate (``\\ud800``), which is no character and has no UTF-8.
    """
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        raise _invalid("a text has a lone surrogate (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:
        raise _invalid(_TOO_DEEP) from None


def _invalid(message: str) -> Refusal:
    return Refusal(400, message, "invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise _invalid("an object of the body has a key twice")
    return content


def _constant(name: str) -> Any:
    raise _invalid(f"{name} is not JSON")
