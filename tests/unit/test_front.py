"""Places and tickets: what a replica's own server answers, how a place begins and ends, and what counts as silence."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import time
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from serving import front
from serving.endpoint import ServeBackend
from serving.front import TICKET, Front
from serving.gateway.routes import NoPlace, Place
from serving.gateway.upstream import PLACE

PATH = "/v1/completions"


class App:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.began = asyncio.Event()
        self.after = 0.0  # seconds of work behind an answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.began.set()
        await self.may.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        await asyncio.sleep(self.after)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[Front, App, httpx.AsyncClient]]:
    app = App()
    found = Front(app, "127.0.0.1")
    await found.start()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        try:
            yield found, app, client
        finally:
            app.may.set()
            await found.stop()


def test_a_ticket_is_good_for_one_request_at_a_time_and_its_place_lasts_until_none_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(front, "KEPT_SECONDS", 3.0)

    async def main() -> None:
        async with running() as (found, app, client):
            hold = found.hold()
            place = await anext(hold)
            url, headers = place["url"], place["headers"]
            assert (await client.post(url + PATH)).status_code == 404
            assert (await client.post(url + PATH, headers={TICKET: "another"})).status_code == 404
            assert (await client.post(f"{url}/v1/load_lora_adapter", headers=headers)).status_code == 404
            answer = asyncio.create_task(client.post(url + PATH, headers=headers))
            await app.began.wait()
            assert (await client.post(url + PATH, headers=headers)).status_code == 404, "it is used"
            end = asyncio.create_task(anext(hold, None))
            await asyncio.sleep(0.05)
            assert not end.done(), "the place lasts as long as the request"
            app.may.set()
            assert (await answer).text == "ok"
            app.after = 0.05
            for _ in range(3):
                assert (await client.post(url + PATH, headers=headers)).text == "ok"
                assert not end.done(), "another may follow"
            assert await asyncio.wait_for(end, 60) is None
            refused = await client.post(url + PATH, headers=headers)
            assert (refused.status_code, refused.headers[PLACE]) == (404, "ended")
            assert found.idle_seconds() == 0

    asyncio.run(main())


def test_an_old_place_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "KEPT_SECONDS", 600.0)
    monkeypatch.setattr(front, "LONGEST_SECONDS", 0.0)

    async def main() -> None:
        async with running() as (found, app, client):
            hold = found.hold()
            place = await anext(hold)
            app.may.set()
            end = asyncio.create_task(anext(hold, None))
            assert (await client.post(place["url"] + PATH, headers=place["headers"])).text == "ok"
            assert await asyncio.wait_for(end, 60) is None

    asyncio.run(main())


def test_a_place_that_nobody_uses_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "UNUSED_SECONDS", 0.05)

    async def main() -> None:
        async with running() as (found, _, client):
            hold = found.hold()
            place = await anext(hold)
            assert await asyncio.wait_for(anext(hold, None), 60) is None
            assert (await client.post(place["url"] + PATH, headers=place["headers"])).status_code == 404

    asyncio.run(main())


def test_an_engine_that_works_on_a_whole_answer_is_not_silent() -> None:
    """Nothing is sent before its end, which may be minutes: steps of the engine count as well as bytes."""
    told: list[Any] = []
    processor = types.SimpleNamespace(update_scheduler_stats=lambda stats: told.append(stats))

    async def main() -> None:
        async with running() as (found, app, client):
            front.on_step(types.SimpleNamespace(output_processor=processor), found.moved)
            hold = found.hold()
            place = await anext(hold)
            answer = asyncio.create_task(client.post(place["url"] + PATH, headers=place["headers"]))
            await app.began.wait()
            await asyncio.sleep(0.1)
            assert found.idle_seconds() >= 0.1
            before = time.monotonic()
            processor.update_scheduler_stats("stats")
            assert found.idle_seconds() <= time.monotonic() - before and told == ["stats"]
            app.may.set()
            await answer

    asyncio.run(main())


def test_vllm_tells_of_steps_where_it_is_listened_for() -> None:
    """`front.on_step` replaces a method that vLLM's loop looks up at each call. Read, as importing takes 10 s."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    engine = Path(spec.origin).parent / "v1" / "engine"
    assert "def update_scheduler_stats(" in (engine / "output_processor.py").read_text()
    assert "output_processor.update_scheduler_stats(outputs" in (engine / "async_llm.py").read_text()


class Held:
    """One call of `hold`, as a handle gives it."""

    def __init__(self, result: Any) -> None:
        self._result, self.cancelled = result, False

    async def __anext__(self) -> Any:
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self, results: Iterator[Any]) -> None:
        self._results, self.calls = results, []  # type: ignore[var-annotated]

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self) -> Held:
        self.calls.append(Held(next(self._results)))
        return self.calls[-1]


FOUND = {"url": "http://10.0.0.1:1", "headers": {TICKET: "t"}}


async def use(handle: Handle, fail: bool = False) -> Place:
    async with ServeBackend("demo", handle, False).place() as place:
        if fail:
            raise ValueError
        return place


def test_a_replica_that_died_is_not_the_last() -> None:
    handle = Handle(iter([ActorDiedError(), ActorDiedError(), FOUND]))
    assert asyncio.run(use(handle)).url == FOUND["url"]
    assert [each.cancelled for each in handle.calls] == [False] * 3


@pytest.mark.parametrize(("errors", "calls"), [([ActorDiedError()] * 4, 3), ([GetTimeoutError()], 1)])
def test_no_place(errors: list[Exception], calls: int) -> None:
    handle = Handle(iter(errors))
    with pytest.raises(NoPlace, match="demo"):
        asyncio.run(use(handle))
    assert len(handle.calls) == calls


def test_a_place_is_given_back_where_its_request_failed() -> None:
    handle = Handle(iter([FOUND]))
    with pytest.raises(ValueError):
        asyncio.run(use(handle, fail=True))
    assert [each.cancelled for each in handle.calls] == [True]
