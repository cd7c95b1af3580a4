"""Places in the replicas of one engine, kept for a moment between requests.

A place is a call through Ray Serve, which costs some milliseconds of the gateway's and of the replica's core. The next
request takes one that was just given back, without asking Serve. Serve counts a kept place as a request under way, so
it lasts for `front.KEPT_SECONDS` only, and takes no other request once it is older than `front.LONGEST_SECONDS`: then
Serve chooses again, by which load moves to new replicas and an old one has rest to end. Its engine ends it; what is
dropped here needs no call. Where requests wait, a place goes from hand to hand, the longest waiting first.

Limits: a gateway that is so busy that it sees the end of an answer late may keep a place that has ended. Its engine
says so (`routes.PlaceEnded`), and the request asks for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from serving import front
from serving.gateway.routes import Place

#: Of what the engine waits for the next request: one that is sent then should not come too late.
IN_TIME = 0.8


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


class Places:
    """Gives places and takes them back.

    Args:
        ask: gets one from Serve; may be cancelled while it waits.
    """

    def __init__(self, ask: Callable[[], Awaitable[Held]]) -> None:
        self._ask = ask
        self._kept: list[Held] = []
        self._wishes: deque[asyncio.Future[Held]] = deque()

    async def take(self) -> Held:
        """A kept place, or else the first that Serve gives or another request gives back.

        Raises:
            Exception: whatever `ask` raises.
        """
        if self._kept and time.monotonic() - self._kept[-1].rested < IN_TIME * front.KEPT_SECONDS:
            return self._kept.pop()
        self._kept.clear()  # what lies under it is older
        wish: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        # In no request's context: Serve would end the call with the request that asked, and others have it after that.
        asking = asyncio.create_task(self._fulfil(wish), context=contextvars.Context())
        self._wishes.append(wish)
        try:
            return await wish
        except asyncio.CancelledError:
            if not wish.cancelled() and wish.exception() is None:  # it came just as the client left
                self.give_back(wish.result())
            raise
        finally:
            asking.cancel()
            with contextlib.suppress(ValueError):
                self._wishes.remove(wish)

    async def _fulfil(self, wish: asyncio.Future[Held]) -> None:
        try:
            held = await self._ask()
        except Exception as error:  # of any kind: it is the waiting request's
            if not wish.done():
                wish.set_exception(error)
            return
        if wish.done():
            self.give_back(held)
        else:
            wish.set_result(held)

    def give_back(self, held: Held) -> None:
        """Its request was answered."""
        held.rested = time.monotonic()
        if held.rested - held.since > front.LONGEST_SECONDS:
            return
        while self._wishes:
            wish = self._wishes.popleft()
            if not wish.done():
                wish.set_result(held)
                return
        self._kept.append(held)

    def give_up(self, held: Held, gone: bool) -> None:
        """Its request failed, or was broken off.

        Args:
            gone: as the engine is: then nothing is kept, for others may have gone with it, and Serve is asked.
        """
        held.call.cancel()
        if gone:
            self._kept.clear()
