"""Whether the engines give tokens: what /health says.

A backend is unwell when a stream that had begun gives nothing for `stall_seconds`, when a probe gets no answer for as
long, or when a probe failed and nothing has succeeded since. A probe is a request for one token; it is sent where
nothing succeeded for half of `stall_seconds` and after a failure, at most one at a time. Silence of answers that are
not streamed says nothing, as they may take minutes: there the probe tells.

A probe takes a place like any request. While it waits for one although others hold some, it says nothing either: all
replicas are at work. Where nobody holds one, there is no replica. A backend that is not awake (`routes.Backend`) is not
probed, and is well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from serving.gateway.metrics import Metrics
from serving.gateway.routes import Backend, Route

log = logging.getLogger("ray_ft.gateway")

#: Sends one token's worth to a route and tells the second argument whether the engine has been asked.
Probe = Callable[[Route, Callable[[bool], None]], Awaitable[None]]


@dataclass
class Replica:
    """Streams of one engine that have begun and have not ended."""

    streams: int = 0
    last: float = 0.0


@dataclass
class Pulse:
    """What one backend showed of itself."""

    succeeded: float = -1e9
    running: int = 0  # requests that hold a place
    suspect: bool = False  # a request failed: a probe is to tell whether that was all of it
    failure: str | None = None
    replicas: dict[str, Replica] = field(default_factory=dict)
    probe: asyncio.Task[None] | None = None
    probe_began: float | None = None
    probe_asked: float | None = None

    def well(self) -> None:
        """An answer, or a part of one, has come."""
        self.succeeded = time.monotonic()
        self.failure, self.suspect = None, False

    def began(self, url: str) -> Replica:
        """A stream gave its first token; the caller keeps `Replica.last` up to date, and says when it ended."""
        replica = self.replicas.setdefault(url, Replica())
        replica.streams += 1
        replica.last = time.monotonic()
        return replica

    def ended(self, url: str) -> None:
        replica = self.replicas[url]
        replica.streams -= 1
        if not replica.streams:
            self.succeeded = max(self.succeeded, replica.last)
            del self.replicas[url]

    def fault(self, now: float, patience: float) -> str | None:
        """Why it is unwell, or None."""
        if any(now - replica.last > patience for replica in self.replicas.values()):
            return f"no token for {patience:g} s though requests are under way"
        if self.probe_asked is not None and now - self.probe_asked > patience:
            return f"no answer to a request for one token for {patience:g} s"
        waits_alone = self.probe_began is not None and self.probe_asked is None and not self.running
        if waits_alone and now - max(self.probe_began or 0.0, self.succeeded) > patience:
            return f"no engine for {patience:g} s"
        return self.failure


class Health:
    """The pulses of all backends, and the task that feels them.

    Args:
        patience: ``stall_seconds``.
        probe: sends a request for one token.
        metrics: where the result is shown.
    """

    def __init__(self, patience: float, probe: Probe, metrics: Metrics) -> None:
        self._patience, self._probe, self._metrics = patience, probe, metrics
        self._pulses: dict[str, Pulse] = {}
        self._routes: tuple[Route, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._told: dict[str, str | None] = {}

    def pulse(self, backend: Backend) -> Pulse:
        found = self._pulses.get(backend.name)
        if found is None:
            found = self._pulses[backend.name] = Pulse()
        return found

    def watch(self, routes: Iterable[Route]) -> None:
        """From now on these; a backend that none of them uses is forgotten once its requests have ended."""
        self._routes = tuple(routes)
        used = {route.backend.name for route in self._routes}
        for name, pulse in list(self._pulses.items()):
            if name not in used and not pulse.replicas:
                if pulse.probe is not None:
                    pulse.probe.cancel()
                del self._pulses[name]
        for name in [name for name in self._told if name not in used]:
            del self._told[name]
            self._metrics.forget(name)

    def faults(self) -> dict[str, str]:
        """What is wrong, by the name of the model: of the first route of each backend that is unwell."""
        now, found, seen = time.monotonic(), {}, set()
        for route in self._routes:
            name = route.backend.name
            if name in seen:
                continue
            seen.add(name)
            fault = self.pulse(route.backend).fault(now, self._patience)
            self._metrics.healthy(name, fault is None)
            if fault is not None:
                found[route.name] = fault
            if fault != self._told.setdefault(name, None):
                self._told[name] = fault
                log.warning("backend %s: %s", name, fault or "gives tokens again")
        return found

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        tasks = [task for task in [self._task, *(pulse.probe for pulse in self._pulses.values())] if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    async def _loop(self) -> None:
        while True:
            for route in {route.backend.name: route for route in reversed(self._routes)}.values():
                self._maybe_probe(route)
            self.faults()
            await asyncio.sleep(min(5.0, self._patience / 8))

    def _maybe_probe(self, route: Route) -> None:
        pulse, now = self.pulse(route.backend), time.monotonic()
        newest = max([pulse.succeeded, *(replica.last for replica in pulse.replicas.values())])
        awake = getattr(route.backend, "awake", None)  # only backends that scale to zero have it
        if (now - newest < self._patience / 2 and not pulse.suspect) or (awake is not None and not awake()):
            return
        if pulse.probe is None or pulse.probe.done():
            pulse.probe = asyncio.create_task(self._one(route, pulse))

    async def _one(self, route: Route, pulse: Pulse) -> None:
        def asked(yes: bool) -> None:
            pulse.probe_asked = time.monotonic() if yes else None

        pulse.suspect, pulse.probe_began = False, time.monotonic()
        try:
            # Twice as long as /health needs to say so: an engine that answers after all is well at once.
            async with asyncio.timeout(2 * self._patience):
                await self._probe(route, asked)
            pulse.well()
        except TimeoutError:
            if pulse.probe_asked is not None or not pulse.running:
                pulse.failure = f"no answer to a request for one token for {2 * self._patience:g} s"
        except Exception as error:  # whatever a backend raises: it is not well
            pulse.failure = f"a request for one token failed ({type(error).__name__})"
        finally:
            pulse.probe_began = pulse.probe_asked = None
