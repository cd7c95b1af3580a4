"""An update's arithmetic and its failures, against a Serve that only notes what it is told."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from ray_ft.errors import ServeError
from serving import app, engine, rollout


def route(name: str, backend: str, *, run: str | None = "run", base: str = "b", step: int = 1, **more: Any) -> Any:
    return {"name": name, "backend": backend, "details": {"run": run, "step": step, "base": base}, **more}


def test_routes_after_an_update_keep_their_order_and_their_base() -> None:
    before = [route("a", "a-1", compare="b"), route("c", "c-1", compare=None), route("b", "b-1", run=None)]
    after = rollout.merged(before, [route("a", "a-2", step=2, compare=None), route("d", "d-1", base="x", compare=None)])
    assert [(each["name"], each["backend"], each.get("compare")) for each in after] == [
        ("a", "a-2", "b"), ("c", "c-1", None), ("b", "b-1", None), ("d", "d-1", None),
    ]  # fmt: skip


def test_a_line_for_each_model() -> None:
    old, new, base = route("a", "a-1"), route("a", "a-2", step=2), route("b", "b-1", run=None)
    assert rollout._line(new, old) == "a is now run, step 2; it was run, step 1"
    assert rollout._line(new, None) == "a is new: run, step 2"
    assert rollout._line(old, old) == "a answers as before: run, step 1"
    assert rollout._line(base, None) == "b is new: the base b"


class FakeServe:
    """An endpoint with one model, `a`, and what is done to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.routes = [route("a", "ray-ft-a-1", compare=None)]
        self.apps = {app.APPLICATION: None, "ray-ft-a-1": None}
        self.deleted: list[tuple[str, bool]] = []
        self.gateways: list[list[str]] = []
        self.listen: list[Any] | None = ["127.0.0.1", 1]
        self.takes = True  # the gateway takes the routes that it is given
        monkeypatch.setattr(serve, "get_app_handle", lambda name: self)
        monkeypatch.setattr(serve, "delete", self.delete)
        monkeypatch.setattr(serve, "status", self.status)
        monkeypatch.setattr(rollout, "deploy_gateway", self.deploy_gateway)
        monkeypatch.setattr(engine.Cluster, "read", classmethod(lambda cls: cls()))
        monkeypatch.setattr(engine, "plan", lambda model, cluster: model)
        monkeypatch.setattr(app, "name_of", lambda model: model.backend)
        monkeypatch.setattr(app, "routes", lambda found, plans: [each.route for each in found])
        monkeypatch.setattr(rollout, "SWITCH_SECONDS", 0.2)

    @property
    def bound(self) -> Any:
        return self._call({"settings": {}, "keys": {}, "listen": self.listen})

    @property
    def fields(self) -> Any:
        return self._call(self.routes)

    def _call(self, result: Any) -> Any:
        return types.SimpleNamespace(remote=lambda: types.SimpleNamespace(result=lambda timeout_s: result))

    def deploy_gateway(self, fields: Any, *_: Any) -> None:
        self.gateways.append([each["backend"] for each in fields])
        if self.takes:
            self.routes = list(fields)

    def status(self) -> Any:
        # An engine goes when its last request is answered: here after it has been looked for once.
        gone = [name for name, _ in self.deleted if name in self.apps]
        shown = {name: types.SimpleNamespace(message="it is ill") for name in self.apps}
        for name in gone:
            del self.apps[name]
        return types.SimpleNamespace(applications=shown)

    def delete(self, name: str, _blocking: bool = True) -> None:
        self.deleted.append((name, _blocking))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    return FakeServe(monkeypatch)


def new(backend: str = "ray-ft-a-2", **more: Any) -> Any:
    return types.SimpleNamespace(backend=backend, route=route("a", backend, compare=None, **more))


def test_an_update_waits_for_the_old_one_without_a_limit_of_its_own(
    fake: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "start", lambda *_: fake.apps.__setitem__("ray-ft-a-2", None))
    assert rollout.update([new(step=2)], lambda phase: None, Path()) == ["a is now run, step 2; it was run, step 1"]
    assert fake.gateways == [["ray-ft-a-2"]]
    assert fake.deleted == [("ray-ft-a-1", False)], "Serve's own wait gives up after 60 s"
    assert set(fake.apps) == {app.APPLICATION, "ray-ft-a-2"}


def test_a_gateway_that_does_not_take_the_routes_leaves_nothing_of_the_new_version(
    fake: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "start", lambda *_: fake.apps.__setitem__("ray-ft-a-2", None))
    fake.takes = False
    with pytest.raises(ServeError, match=r"did not take its new routes within 0\.2 s: it is ill"):
        rollout.update([new()], lambda phase: None, Path())
    assert fake.gateways == [["ray-ft-a-2"], ["ray-ft-a-1"]], "told of the old routes again"
    assert fake.deleted == [("ray-ft-a-2", False)]


def test_another_update_that_came_through_meanwhile_is_kept(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "start", lambda *_: fake.routes.append(route("z", "ray-ft-z-1", compare=None)))
    rollout.update([new(step=2)], lambda phase: None, Path())
    assert fake.gateways == [["ray-ft-a-2", "ray-ft-z-1"]]


def test_what_serves_own_tools_deployed_is_theirs_to_change(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "start", lambda *_: pytest.fail("started"))
    fake.listen = None
    with pytest.raises(ServeError, match="was deployed by Serve's own tools"):
        rollout.update([new()], lambda phase: None, Path())
    assert fake.gateways == []


def test_what_runs_already_is_not_started_again(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "run_many", lambda *_, **__: pytest.fail("started"))
    assert rollout.update([new("ray-ft-a-1")], lambda phase: None, Path()) == ["a answers as before: run, step 1"]
    assert fake.deleted == []


def test_no_wait_for_room_on_a_machine_of_ones_own(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(rollout, "start", lambda *given: waited.append(given[-1]))
    rollout.update([new()], lambda phase: None, Path())
    monkeypatch.setattr(engine.Cluster, "read", classmethod(lambda cls: cls(private=False)))
    rollout.update([new()], lambda phase: None, Path())
    assert waited == [rollout.OWN_ROOM_SECONDS, rollout.ROOM_SECONDS]


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        ({"x": 0.7, "y": 0.3}, False),
        ({"x": 0.69, "y": 0.31}, False),
        ({"x": 0.6, "y": 0.4}, True),
        ({"x": 0.7, "z": 0.3}, True),
        ({"x": float("nan"), "y": float("nan")}, True),
    ],
)
def test_labels_are_compared_with_the_exports(
    found: dict[str, float], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = {"input": "a", "probabilities": {"x": 0.7, "y": 0.3}}
    manifest = types.SimpleNamespace(content={"proof": proof}, folder="f")
    monkeypatch.setattr(rollout, "_ask", lambda *_: {"data": [{"probabilities": found}]})
    served: Any = types.SimpleNamespace(name="m", manifest=manifest)
    if refused:
        with pytest.raises(ServeError, match="does not answer as it was exported"):
            rollout._compare_labels(served, "app")
    else:
        rollout._compare_labels(served, "app")
