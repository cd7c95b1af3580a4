"""Places are kept for the next request, go from hand to hand where some wait, and none is lost or kept for good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import fake_engine as fake
import httpx
import pytest

from serving import front, places
from serving.endpoint import ServeBackend
from serving.front import Front
from serving.gateway import Gateway, Place, Settings
from serving.gateway.routes import NoPlace
from serving.places import Held, Places


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take seconds between two lines."""
    monkeypatch.setattr(front, "KEPT_SECONDS", 60.0)
    monkeypatch.setattr(front, "LONGEST_SECONDS", 60.0)


class Call:
    """What a handle returns: here it only knows whether it was cancelled."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Serve:
    """Gives a place each time that it is told to."""

    def __init__(self, free: int = 0) -> None:
        self.free, self.given, self.asked, self.broken_off = asyncio.Semaphore(free), [], 0, 0  # type: ignore[var-annotated]

    async def ask(self) -> Held:
        self.asked += 1
        try:
            await self.free.acquire()
        except asyncio.CancelledError:
            self.broken_off += 1
            raise
        self.given.append(Held(Place(f"http://engine-{len(self.given)}", {}), Call()))
        return self.given[-1]


async def turns() -> None:
    """What is ready has run."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_next_request_takes_what_was_just_given_back() -> None:
    async def main() -> None:
        serve = Serve(free=9)
        found = Places(serve.ask)
        first, second = await found.take(), await found.take()
        found.give_back(first)
        found.give_back(second)
        assert [await found.take(), await found.take()] == [second, first]
        assert serve.asked == 2 and await found.take() not in (first, second)

    asyncio.run(main())


@pytest.mark.parametrize(("limit", "lies"), [("KEPT_SECONDS", 0.02), ("LONGEST_SECONDS", 0.0)])
def test_what_lay_too_long_or_is_old_is_not_taken(monkeypatch: pytest.MonkeyPatch, limit: str, lies: float) -> None:
    monkeypatch.setattr(front, limit, lies / 2)

    async def main() -> None:
        serve = Serve(free=9)
        found = Places(serve.ask)
        found.give_back(first := await found.take())
        await asyncio.sleep(lies)
        assert await found.take() is not first and not first.call.cancelled  # its engine ends it

    asyncio.run(main())


def test_where_requests_wait_a_place_goes_to_the_one_that_waits_longest() -> None:
    async def main() -> None:
        serve = Serve(free=1)
        found = Places(serve.ask)
        held = await found.take()
        waiting = [asyncio.create_task(found.take()) for _ in range(3)]
        await turns()
        for task in waiting:
            assert [each.done() for each in waiting].index(False) == waiting.index(task)
            found.give_back(held)
            assert await task is held
        await turns()
        assert (serve.asked, serve.broken_off, len(serve.given)) == (4, 3, 1)

    asyncio.run(main())


def test_a_place_that_serve_gives_to_one_that_has_one_already_is_not_lost() -> None:
    async def main() -> None:
        serve = Serve(free=1)
        found = Places(serve.ask)
        held = await found.take()
        waiting = asyncio.create_task(found.take())
        await turns()
        serve.free.release()  # both in one turn of the loop: Serve's wakes first
        await asyncio.sleep(0)
        found.give_back(held)
        taken = await waiting
        others = [each for each in serve.given if each is not taken]
        assert len(serve.given) == 2 and await found.take() in others

    asyncio.run(main())


@pytest.mark.parametrize("handed", [False, True])
def test_a_client_that_leaves_while_it_waits_costs_no_place(handed: bool) -> None:
    async def main() -> None:
        serve = Serve(free=1)
        found = Places(serve.ask)
        held = await found.take()
        waiting = asyncio.create_task(found.take())
        await turns()
        if handed:
            found.give_back(held)
        waiting.cancel()  # before it has seen what it was handed
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await turns()
        assert serve.broken_off == 1
        if not handed:
            found.give_back(held)
        assert await found.take() is held

    asyncio.run(main())


def test_what_asking_raises_reaches_the_request() -> None:
    async def main() -> None:
        async def ask() -> Held:
            raise NoPlace("none")

        with pytest.raises(NoPlace, match="none"):
            await Places(ask).take()

    asyncio.run(main())


@pytest.mark.parametrize("gone", [False, True])
def test_where_an_engine_has_gone_nothing_is_kept(gone: bool) -> None:
    async def main() -> None:
        serve = Serve(free=9)
        found = Places(serve.ask)
        one, other = [await found.take() for _ in range(2)]
        found.give_back(other)
        found.give_up(one, gone=gone)
        assert one.call.cancelled and not other.call.cancelled
        assert (await found.take() is other) is not gone

    asyncio.run(main())


def test_a_call_that_serve_breaks_off_is_no_place_and_not_waited_for() -> None:
    class Broken:
        cancelled = False

        async def __anext__(self) -> Any:
            raise asyncio.CancelledError  # as Ray gives a call that was cancelled elsewhere

        def cancel(self) -> None:
            self.cancelled = True

    class Breaking:
        def options(self, **_: Any) -> Any:
            return self

        def remote(self) -> Broken:
            return Broken()

    async def main() -> None:
        with pytest.raises(NoPlace, match="broke"):
            async with asyncio.timeout(60), ServeBackend("demo", Breaking(), False).place():  # type: ignore[arg-type]
                pass

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------- with real tickets


class Holding:
    """A streaming call of `Front.hold`, driven on as Serve does."""

    def __init__(self, engine: Front, slots: asyncio.Semaphore) -> None:
        self._found: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.task = asyncio.create_task(self._run(engine, slots))

    async def _run(self, engine: Front, slots: asyncio.Semaphore) -> None:
        async with slots, contextlib.aclosing(engine.hold()) as held:
            async for place in held:
                await self._found.put(place)

    async def __anext__(self) -> dict[str, Any]:
        return await self._found.get()

    def cancel(self) -> None:
        self.task.cancel()


class Handle:
    """Of a deployment with one replica that takes so many requests at once."""

    def __init__(self, engine: Front, most: int) -> None:
        self._engine, self._slots, self.calls = engine, asyncio.Semaphore(most), []  # type: ignore[var-annotated]

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self) -> Holding:
        self.calls.append(Holding(self._engine, self._slots))
        return self.calls[-1]


@contextlib.asynccontextmanager
async def served(
    most: int, settings: Settings | None = None
) -> AsyncIterator[tuple[Handle, Gateway, httpx.AsyncClient, Front]]:
    engine = Front(fake.Engine(secret=None), "127.0.0.1")  # type: ignore[arg-type]
    await engine.start()
    handle = Handle(engine, most)
    gateway = Gateway(settings or Settings(), fake.keys(), [fake.route("demo", ServeBackend("demo", handle, False))])  # type: ignore[arg-type]
    await gateway.start()
    transport = httpx.ASGITransport(app=gateway)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=fake.HEADERS) as client:
        try:
            async with asyncio.timeout(60):  # the gateway's own first request
                while gateway._upstream.health.pulse(gateway._routes["demo"].backend).succeeded < 0:
                    await asyncio.sleep(0.01)
            yield handle, gateway, client, engine
        finally:
            await gateway.stop()
            await engine.stop()


async def ask(client: httpx.AsyncClient, words: str = "one two", stream: bool = False) -> int:
    body = {"model": "demo", "prompt": words, "max_tokens": 8, "stream": stream}
    answer = await client.post("/v1/completions", json=body)
    assert words.split()[0] in answer.text, answer.text
    return answer.status_code


def test_requests_one_after_the_other_share_a_place() -> None:
    async def main() -> None:
        async with served(most=4) as (handle, _, client, _):
            assert [await ask(client, stream=at % 2 == 1) for at in range(12)] == [200] * 12
            assert len(handle.calls) == 1

    asyncio.run(main())


def test_more_requests_than_places_are_all_answered_and_all_places_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "KEPT_SECONDS", 0.1)

    async def main() -> None:
        async with served(most=3) as (handle, _, client, engine):
            assert await asyncio.gather(*(ask(client, f"word-{at} x") for at in range(40))) == [200] * 40
            async with asyncio.timeout(60):
                await asyncio.gather(*(call.task for call in handle.calls), return_exceptions=True)
            assert engine._tickets == {}

    asyncio.run(main())


def test_a_place_that_has_ended_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "KEPT_SECONDS", 0.01)
    monkeypatch.setattr(places, "IN_TIME", 6000.0)

    async def main() -> None:
        async with served(most=4, settings=Settings(max_waiting=1)) as (handle, gateway, client, engine):
            for calls in (1, 2, 3):
                assert len(handle.calls) == calls
                async with asyncio.timeout(60):
                    while engine._tickets:
                        await asyncio.sleep(0.01)
                assert await ask(client) == 200
            while engine._tickets:
                await asyncio.sleep(0.01)
            asked: list[bool] = []
            await gateway._upstream.probe(gateway._routes["demo"], asked.append)  # its own request finds the same
            assert asked == [False, True, False, True]  # while it waits again it is no silence of the engine
            assert len(handle.calls) == 5 and gateway._upstream.health.faults() == {}

    asyncio.run(main())


def test_a_place_is_free_before_a_slow_client_has_its_answer() -> None:
    async def main() -> None:
        async with served(most=1) as (handle, gateway, client, _):
            backend: Any = gateway._routes["demo"].backend
            kept: list[int] = []
            reads = asyncio.Event()

            async def slow(message: Any) -> None:
                kept.append(len(backend._places._kept))
                await reads.wait()

            body = b'{"model": "demo", "prompt": "one two", "max_tokens": 8}'
            headers = [(name.lower().encode(), value.encode()) for name, value in fake.HEADERS.items()]
            asked = asyncio.Queue[Any]()
            asked.put_nowait({"type": "http.request", "body": body})
            scope = {
                "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
                "headers": [*headers, (b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
            }  # fmt: skip
            answered = asyncio.create_task(gateway(scope, asked.get, slow))  # type: ignore[arg-type]
            async with asyncio.timeout(60):
                while not kept:
                    await asyncio.sleep(0.01)
                assert kept == [1] and not answered.done()
                assert await ask(client) == 200  # on the only place
                reads.set()
                await answered
            assert len(handle.calls) == 1

    asyncio.run(main())


def test_where_all_replicas_have_died_serve_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with served(most=9) as (handle, gateway, client, _):
            backend: Any = gateway._routes["demo"].backend
            dead = [Held(Place(f"http://127.0.0.1:{port}", {}), Call()) for port in (1, 2)]
            for held in dead:
                backend._places.give_back(held)
            calls = len(handle.calls)
            assert await ask(client) == 200
            assert len(handle.calls) == calls + 1

    asyncio.run(main())
