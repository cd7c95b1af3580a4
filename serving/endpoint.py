"""The gateway as a Ray Serve deployment: one HTTP port in front of all models, whatever engines answer.

`ray-ft serve` lets it listen itself, so that a token passes one process between engine and client. Behind Serve's own
proxy (`serve deploy`, KubeRay) it answers as an ordinary ingress as well, at the price of Ray's data path. Which names
go to which engines is Serve's `user_config`: it is replaced without a restart, and a restarted gateway gets the newest.

Limits: one gateway for an endpoint; its limits per key live in its memory and begin anew when it is restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serving import address
from serving.front import Server
from serving.gateway import server
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.routes import EngineGone, NoPlace, Place, PlaceEnded, Route
from serving.gateway.settings import Settings
from serving.loopback import listen_on_loopback
from serving.places import Held, Places

STOP_SECONDS = 3


class ServeBackend:
    """Places in the replicas of one engine's deployment (a `serving.gateway.routes.Backend`)."""

    def __init__(self, name: str, handle: DeploymentHandle, sleeps: bool) -> None:
        self.name = name
        self._handle = handle.options(method_name="hold", stream=True)
        self._sleeps = sleeps
        self._places = Places(self._ask)

    def awake(self) -> bool:
        """Whether the gateway may ask it unasked: an engine that gives its place back when idle never would."""
        return not self._sleeps

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Waits while all replicas are full, and while one is started for an engine that was scaled to zero.

        Raises:
            NoPlace: there is no such engine any more, or replicas died one after the other.
        """
        held = await self._places.take()
        try:
            yield held.place
        except PlaceEnded:
            raise
        except BaseException as error:
            # Any other place lasts until it is seen as unused.
            self._places.give_up(held, gone=isinstance(error, EngineGone | aiohttp.ClientError | OSError))
            raise
        self._places.give_back(held)

    async def _ask(self) -> Held:
        for last in (False, False, True):
            call = self._handle.remote()
            try:
                found = await anext(call)
            except RayActorError as error:
                # A replica that has just died, of which Serve learns by this very call. Nothing was asked yet.
                if last:
                    raise NoPlace(f"{self.name}: {type(error).__name__}") from error
            except (RayError, RayServeException, StopAsyncIteration) as error:
                raise NoPlace(f"{self.name}: {type(error).__name__}") from error
            except asyncio.CancelledError:
                call.cancel()
                if asyncio.current_task().cancelling():  # type: ignore[union-attr] # it runs in one
                    raise
                raise NoPlace(f"{self.name}: Serve broke the call off") from None
            except BaseException:
                call.cancel()
                raise
            else:
                return Held(Place(found["url"], found["headers"]), call)
        raise AssertionError("the last attempt returns or raises")


@serve.ingress()
class Endpoint:
    """The gateway, and where it listens.

    Args:
        settings: the recipe's ``serve.gateway``.
        keys: hashes of the keys from the environment, by name; never the keys, as Ray writes arguments to its logs.
        listen: (host, port) of its own; None: behind Serve's proxy only.
        handles: engines of the same application, by the name that routes call them; others are applications.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self,
        settings: Mapping[str, Any],
        keys: Mapping[str, str],
        listen: tuple[str, int] | None = None,
        handles: Mapping[str, DeploymentHandle] | None = None,
    ) -> None:
        self._handles = dict(handles or {})
        self._backends: dict[str, ServeBackend] = {}
        self._bound = {"settings": dict(settings), "keys": dict(keys), "listen": listen}
        self._gateway = Gateway(
            Settings.of(settings), Keys(keys, settings["api_keys_file"], tuple(settings["admins"])), []
        )
        self._fields: list[Mapping[str, Any]] = []
        listen_on_loopback()
        _log_requests()
        await self._gateway.start()
        self._listening: asyncio.Task[None] | None = None
        if listen is not None:
            self._listening = asyncio.create_task(_listen(self._gateway, *listen))

    async def __del__(self) -> None:
        await self._gateway.stop()

    async def __serve_build_asgi_app__(self) -> Gateway:
        """What Serve's own proxy reaches."""
        return self._gateway

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Take other routes: ``{"routes": [what `serving.app.routes` makes]}``."""
        routes = []
        for each in config["routes"]:
            fields = dict(each)
            name, sleeps = fields.pop("backend"), fields.pop("sleeps")
            if name not in self._backends:
                handle = self._handles.get(name) or serve.get_app_handle(name)
                self._backends[name] = ServeBackend(name, handle, sleeps)
            routes.append(Route(**{**fields, "backend": self._backends[name], "examples": tuple(fields["examples"])}))
        self._gateway.replace(routes)
        self._fields = list(config["routes"])
        used = {each["backend"] for each in config["routes"]}
        # The handle of an engine that is gone goes once nothing holds a place through it: requests keep their own.
        self._backends = {name: backend for name, backend in self._backends.items() if name in used}

    async def fields(self) -> list[Mapping[str, Any]]:
        """The routes that are in use, as they were given."""
        return self._fields

    async def bound(self) -> dict[str, Any]:
        """The arguments that it was made with: an update deploys it with the same ones."""
        return self._bound

    def check_health(self) -> None:
        if self._listening is not None and self._listening.done():
            raise RuntimeError(f"the gateway does not listen any more: {self._listening.exception()}")


async def _listen(gateway: Gateway, host: str, port: int) -> None:
    config = server.config(gateway, lifespan="off", timeout_graceful_shutdown=STOP_SECONDS)
    await Server(config).serve(sockets=[address.listening(host, port)])


def _log_requests() -> None:
    """Ray keeps what a replica writes in a file of the session's logs."""
    access = logging.getLogger("ray_ft.gateway.access")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers[:] = [handler]
    access.setLevel(logging.INFO)
    access.propagate = False
