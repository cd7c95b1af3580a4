"""What the gateway is told about the models behind it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Place:
    """Where one request goes: held until its answer is complete.

    Attributes:
        url: the engine's own HTTP server, such as ``http://10.0.0.1:41234``.
        headers: to be sent along, such as the engine's secret.
    """

    url: str
    headers: Mapping[str, str]


class EngineGone(Exception):
    """The engine of a place did not take the request: it can be sent to another one."""


class PlaceEnded(Exception):
    """The engine does not know the place any more, as it was kept a moment too long: another one is asked for."""


class NoPlace(Exception):
    """There is no engine that could take the request, and waiting would not bring one. The client is told 503."""


class Backend(Protocol):
    """Replicas of one engine.

    A backend that scales to zero also has ``awake() -> bool``: whether a replica is up. The gateway's own probes ask
    only while it is true, so that they wake nothing; a backend without the method is always awake.
    """

    @property
    def name(self) -> str: ...

    def place(self) -> AbstractAsyncContextManager[Place]:
        """Waits while all replicas are full or none is there yet; may be cancelled while it waits.

        Raises:
            NoPlace: on entering.
        """
        ...


@dataclass(frozen=True)
class Route:
    """A model that clients can ask for.

    Attributes:
        name: what clients ask for.
        engine_name: what the engine calls it: its base, or one of its adapters.
        backend: where it runs; several routes may share one.
        kind: ``generate``: chat and completions; ``classify``: labels of texts.
        max_model_len: longest prompt plus answer, in tokens.
        chat: the model has a chat template.
        vision: the model sees images.
        details: run, step, base, created: shown by ``GET /v1/models`` under ``ray_ft``.
        compare: name of the route with its base model.
        examples: held-out prompts with references, for the playground.
    """

    name: str
    engine_name: str
    backend: Backend
    kind: Literal["generate", "classify"]
    max_model_len: int
    chat: bool
    vision: bool
    details: Mapping[str, Any]
    compare: str | None = None
    examples: tuple[Mapping[str, Any], ...] = ()

    def listed(self) -> dict[str, Any]:
        """Its entry in the list of models."""
        known = {
            "kind": self.kind,
            "chat": self.chat,
            "vision": self.vision,
            "max_model_len": self.max_model_len,
            "run": self.details.get("run"),
            "step": self.details.get("step"),
            "base": self.details.get("base"),
            "compare": self.compare,
        }
        created = self.details.get("created")
        return {
            "id": self.name,
            "object": "model",
            "created": int(created) if isinstance(created, int | float) else 0,
            "owned_by": "ray-ft",
            "ray_ft": {**{key: value for key, value in self.details.items() if key != "created"}, **known},
        }


def by_name(routes: tuple[Route, ...]) -> dict[str, Route]:
    """Routes by what clients ask for.

    Raises:
        ValueError: two routes have the same name.
    """
    named = {route.name: route for route in routes}
    if len(named) != len(routes):
        twice = sorted({route.name for route in routes if [other.name for other in routes].count(route.name) > 1})
        raise ValueError(f"several routes are named {', '.join(map(repr, twice))}")
    return named
