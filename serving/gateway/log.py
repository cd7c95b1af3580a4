"""The access log: one JSON line for each request, without keys, prompts or answers."""

from __future__ import annotations

import json
import logging
import time

from serving.gateway.exchange import Exchange

access = logging.getLogger("ray_ft.gateway.access")

#: Paths come from strangers.
LONGEST_PATH = 120
#: As proxies log a client that went away before it was answered.
GONE = 499


def line(exchange: Exchange) -> None:
    """Write the line of a request that has ended.

    ``{"time": UTC, "id", "method", "path", "key", "model", "status", "prompt_tokens", "answer_tokens", "ttft",
    "seconds"}``; times in seconds, `ttft` is null where nothing was streamed, and ``"estimated": true`` where a client
    went away before the engine said how many tokens there were.
    """
    if not access.isEnabledFor(logging.INFO):
        return
    now = time.time()
    began = now - (time.monotonic() - exchange.began)
    content = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(began))}.{int(began % 1 * 1000):03d}Z",
        "id": exchange.id,
        "method": exchange.method[:16],
        "path": exchange.path[:LONGEST_PATH],
        "key": exchange.key,
        "model": exchange.model,
        "status": exchange.status or GONE,
        "prompt_tokens": exchange.prompt_tokens,
        "answer_tokens": exchange.answer_tokens,
        "ttft": round(exchange.first - exchange.began, 4) if exchange.first else None,
        "seconds": round(now - began, 4),
    }
    if exchange.estimated:
        content["estimated"] = True
    # Not access.info: looking up the line of code that calls costs as much as all the rest.
    access.handle(access.makeRecord(access.name, logging.INFO, __file__, 0, json.dumps(content), (), None))
