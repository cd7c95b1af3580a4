"""Cross-origin requests from browsers: refused unless the page's origin is allowlisted."""

from __future__ import annotations

from serving.gateway.exchange import Exchange

PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
]


def checked(exchange: Exchange, origins: tuple[str, ...]) -> bool:
    """Add the headers that let an allowlisted origin read the answer. Returns whether this is its preflight.

    Other origins get no headers, by which their browser keeps the answer from them; their preflight is refused as any
    method that is not offered. No credentials are allowed: keys come in a header that a page has to set.
    """
    origin = exchange.headers.get(b"origin")
    if not origins or origin is None:
        return False
    exchange.extra.append((b"vary", b"origin"))
    if origin.decode("latin-1") not in origins:
        return False
    exchange.extra.append((b"access-control-allow-origin", origin))
    exchange.extra.append((b"access-control-expose-headers", b"x-request-id, retry-after"))
    return exchange.method == "OPTIONS" and b"access-control-request-method" in exchange.headers


async def answer_preflight(exchange: Exchange) -> None:
    exchange.extra += PREFLIGHT
    await exchange.start(204, [])
    await exchange.send({"type": "http.response.body"})
