"""Places in the replicas of one engine, kept for a moment between requests.

A place is a call through Ray Serve, which costs some milliseconds of the gateway's and of the replica's core. The next
request takes one that was just given back, without asking Serve. Serve counts a kept place as a request under way, so
it is kept for `KEPT_SECONDS` only, and given back for good once it is older than `LONGEST_SECONDS`: then Serve chooses
again, by which load moves to new replicas and an old one has rest to end. Where requests wait, a place goes from hand
to hand, the longest waiting first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from serving.gateway.routes import Place

#: Less than half of what the engine's server waits for the next request (`front.KEPT_SECONDS`), so that one that was
#: sent in time seldom comes too late.
KEPT_SECONDS = 0.2
LONGEST_SECONDS = 5.0


@dataclass(eq=False)
class Held:
    """A place and the call that holds it.

    Attributes:
        call: what Serve's handle returned; `cancel` ends it.
        since, rested: when it was got, and when its last request was answered, as of time.monotonic.
    """

    place: Place
    call: Any
    since: float = field(default_factory=time.monotonic)
    rested: float = 0.0


@dataclass(eq=False)
class _Wish:
    found: asyncio.Future[Held]
    asking: asyncio.Task[None] | None = None


class Places:
    """Gives places and takes them back.

    Args:
        ask: gets one from Serve; may be cancelled while it waits.
    """

    def __init__(self, ask: Callable[[], Awaitable[Held]]) -> None:
        self._ask = ask
        self._kept: list[Held] = []
        self._wishes: deque[_Wish] = deque()

    async def take(self) -> Held:
        """A kept place, or else the first that Serve gives or another request gives back.

        Raises:
            Exception: whatever `ask` raises.
        """
        if self._kept and time.monotonic() - self._kept[-1].rested < KEPT_SECONDS:
            return self._kept.pop()
        self._kept.clear()  # what lies under it is older; the engines end them
        wish = _Wish(asyncio.get_running_loop().create_future())
        wish.asking = asyncio.create_task(self._fulfil(wish))
        self._wishes.append(wish)
        try:
            return await wish.found
        except asyncio.CancelledError:
            if not wish.found.cancelled() and wish.found.exception() is None:  # it came just as the client left
                self.give_back(wish.found.result())
            raise
        finally:
            wish.asking.cancel()
            with contextlib.suppress(ValueError):
                self._wishes.remove(wish)

    async def _fulfil(self, wish: _Wish) -> None:
        try:
            held = await self._ask()
        except Exception as error:  # of any kind: it is the waiting request's
            if not wish.found.done():
                wish.found.set_exception(error)
            return
        if wish.found.done():
            self.give_back(held)
        else:
            wish.found.set_result(held)

    def give_back(self, held: Held) -> None:
        """Its request was answered."""
        held.rested = time.monotonic()
        if held.rested - held.since > LONGEST_SECONDS:
            held.call.cancel()
            return
        while self._wishes:
            wish = self._wishes.popleft()
            if not wish.found.done():
                wish.found.set_result(held)
                return
        self._kept.append(held)

    def give_up(self, held: Held) -> None:
        """Its request failed, or was broken off: what else is kept of that engine is not trusted either."""
        held.call.cancel()
        for other in [other for other in self._kept if other.place.url == held.place.url]:
            self._kept.remove(other)
            other.call.cancel()
