"""Answers that are errors, in the form of the OpenAI protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence

#: The protocol's name for a kind of error, by status.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

Headers = Sequence[tuple[bytes, bytes]]


class Refusal(Exception):
    """A request that is not answered with what it asked for. Raised anywhere, answered by the gateway.

    Args:
        status: HTTP status.
        message: what is wrong, for the person who asked: nothing about the inside of this server.
        code: short name of the error, for programs.
        param: field of the request that is meant.
        headers: further headers of the answer.
        close: end the connection after the answer, because the rest of the request is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        *,
        headers: Headers = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = [*headers, (b"connection", b"close")] if close else list(headers)

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "code": self.code, "param": self.param}
        # ensure_ascii: a message may quote any text of the request, lone surrogates included.
        return json.dumps({"error": error}).encode()


def shown(value: object, longest: int = 64) -> str:
    """A value of a request, short enough to be quoted in an error."""
    text = repr(value[: longest + 1] if isinstance(value, str) else value)
    return text if len(text) <= longest + 2 else f"{text[:longest]}…"
