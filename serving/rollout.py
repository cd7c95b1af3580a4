"""Bringing engines up, proving that they answer as they were exported, and letting them replace others.

A new version stands beside the old one until it has been proved; then the gateway sends new requests to it, and the old
one goes when its last request is answered. Whatever goes wrong before that leaves the old one as it is. Limits: while
both stand, the cluster holds both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_ft.errors import ServeError
from ray_ft.vllm_failure import cause
from serving import app, engine
from serving.models import Model, Served

LOG_TAIL = 12  # lines of a failed replica's log that are shown

#: Mean difference of log-probabilities (nats per token) between the trained weights, as the export recorded them, and
#: the engine. bfloat16 kernels of different makes were seen to differ by some hundredths, other weights by whole nats.
TOLERANCE = 0.1

#: Largest difference of a label's probability, between what a classifier's export recorded and its replica.
LABEL_TOLERANCE = 0.02

#: For one prompt; a replica on CPU, loaded for the first time, is slow.
ASK_SECONDS = 300
SWITCH_SECONDS = 60
ROOM_SECONDS = 900.0  # nodes of a cloud take some minutes
#: The same on a machine of one's own, where no room will come: Serve itself says so only after 30 s.
OWN_ROOM_SECONDS = 45.0

Phase = Callable[[str], None]


def start(
    found: Sequence[Model],
    plans: Mapping[str, engine.Plan],
    on_phase: Phase,
    logs: Path,
    room_seconds: float = math.inf,
) -> None:
    """Deploy engines and wait until each answers as it should.

    Args:
        room_seconds: how long to wait for nodes with room.

    Raises:
        ServeError: one has no room, does not start, or answers otherwise; none of them is left.
    """
    from ray import serve

    names = [app.name_of(model) for model in found]
    if not names:  # an update to what runs already
        return
    try:
        serve.run_many(
            [serve.RunTarget(app.deployment(plans[name]), name=name, route_prefix=None) for name in names],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        wait([app.APPLICATION, *names], on_phase, logs, room_seconds)
        on_phase("comparing answers with the export")
        for model, name in zip(found, names, strict=True):
            verify(model, name)
    except BaseException:
        for name in names:
            serve.delete(name, _blocking=False)
        raise


def wait(names: Sequence[str], on_phase: Phase, logs: Path, room_seconds: float) -> None:
    """Until the applications run.

    Raises:
        ServeError: with the cause, as the replica's own processes wrote it.
    """
    from ray import serve

    began = time.monotonic()

    while True:
        overviews = [serve.status().applications[name] for name in names]
        messages = [each.message for overview in overviews for each in overview.deployments.values()]
        if all(overview.status == "RUNNING" for overview in overviews):
            return
        for name, overview in zip(names, overviews, strict=True):
            if overview.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                own = [each.message for each in overview.deployments.values()]
                what = "gateway" if name == app.APPLICATION else "model"
                raise failure("\n".join([overview.message, *own]), logs, what)
        # Serve says so after 30 s without a node that has the resources.
        waiting = next((message for message in messages if "to be scheduled" in message), None)
        if waiting and time.monotonic() - began > room_seconds:
            raise ServeError(
                f"no room for it beside what runs, after {room_seconds:.0f} s: {' '.join(waiting.split())[:300]}",
                ["add nodes to the cluster", "fewer serve.replicas", "stop what runs, and start again with this one"],
            )
        on_phase(f"waiting for resources: {' '.join(waiting.split())[:200]}" if waiting else "loading the model")
        time.sleep(0.5)


def verify(model: Model, name: str) -> None:
    """Ask an engine, past the gateway, for the probabilities of a real row, and compare with what its export recorded.

    Raises:
        ServeError: it answers otherwise, or not at all.
    """
    for served in model.served:
        if model.classifies:
            _compare_labels(served, name)
        else:
            _compare(served, name)
    if model.base:
        _ask(name, {"model": model.name, "prompt": "a", "max_tokens": 1})


def _compare_labels(served: Served, name: str) -> None:
    """A classifier's proof is ``input``, a text, and ``probabilities`` by label; without one it only has to answer."""
    proof = served.manifest.content.get("proof") or {}
    body = {"model": served.name, "input": proof.get("input", "a")}
    found = _ask(name, body, "/v1/classify")["data"][0]["probabilities"]
    expected = proof.get("probabilities", found)
    apart = max(abs(found.get(label, math.nan) - value) for label, value in expected.items())
    whole = math.isclose(sum(found.values()), 1, abs_tol=0.01)  # NaN is not, either
    if set(found) != set(expected) or not apart <= LABEL_TOLERANCE or not whole:
        raise ServeError(
            f"{served.name!r} from {served.manifest.folder!r} does not answer as it was exported: it gives {found}"
            + (f", the export recorded {expected}" if proof else ""),
            ["export it again", "copy the whole folder again"],
        )


def _compare(served: Served, name: str) -> None:
    proof = served.manifest.content["proof"]
    body = {
        "model": served.name, "prompt": proof["token_ids"], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
    }  # fmt: skip
    found = _ask(name, body)["choices"][0]["prompt_logprobs"]
    pairs = zip(proof["token_ids"][1:], found[1:], proof["logprobs"], strict=True)
    differences = [abs(given[str(token)]["logprob"] - expected) for token, given, expected in pairs]
    mean = sum(differences) / max(len(differences), 1)
    if not mean <= TOLERANCE:  # also refuses NaN
        raise ServeError(
            f"{served.name!r} from {served.manifest.folder!r} does not answer as it was exported: the log-probabilities"
            f" of a held-out row differ by {mean:.3g} nats a token, over {TOLERANCE}",
            ["export the run again: ray-ft export RUN", "check that the engine is the one in requirements/"],
        )


def _ask(name: str, body: Mapping[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    import httpx
    from ray import serve
    from ray.exceptions import RayError

    held = serve.get_app_handle(name).options(method_name="hold", stream=True).remote()
    try:
        place = next(iter(held))
        with httpx.Client(trust_env=False, timeout=ASK_SECONDS) as client:
            reply = client.post(f"{place['url']}{path}", json=dict(body), headers=place["headers"])
    except (httpx.HTTPError, RayError, StopIteration) as error:
        raise ServeError(f"{body['model']!r} does not answer: {type(error).__name__}: {error}") from error
    if reply.status_code != 200:
        raise ServeError(f"{body['model']!r} does not answer: {reply.status_code} {reply.text[:300]}")
    answer: dict[str, Any] = reply.json()
    return answer


def update(found: Sequence[Model], on_phase: Phase, logs: Path) -> list[str]:
    """Bring engines to a running endpoint; returns a line on each.

    Raises:
        ServeError: a new version does not start, has no room beside the old one, or answers otherwise than it should.
    """
    from ray import serve

    handle = serve.get_app_handle(app.APPLICATION)
    bound = handle.bound.remote().result(timeout_s=SWITCH_SECONDS)

    if bound["listen"] is None:  # its engines are parts of its own application, which would be deployed without them
        raise ServeError(
            "the endpoint was deployed by Serve's own tools",
            ["change args in its config file, and deploy it again: serve deploy serving/config.yaml"],
        )

    def routed() -> list[dict[str, Any]]:
        fields: list[dict[str, Any]] = handle.fields.remote().result(timeout_s=SWITCH_SECONDS)
        return fields

    standing = {each["backend"] for each in routed()}
    cluster = engine.Cluster.read()
    plans = {app.name_of(model): engine.plan(model, cluster) for model in found}
    new = [model for model in found if app.name_of(model) not in standing]
    start(new, plans, on_phase, logs, OWN_ROOM_SECONDS if cluster.private else ROOM_SECONDS)
    before = routed()  # again: loading takes minutes, in which another update may have come through
    after = merged(before, app.routes(found, plans))
    on_phase("sending new requests to it")
    gateway = bound["settings"], bound["keys"], bound["listen"]
    try:
        switch(after, *gateway)
    except BaseException:
        deploy_gateway(before, *gateway)
        for model in new:
            serve.delete(app.name_of(model), _blocking=False)
        raise
    on_phase("letting the old version finish")
    gone = {each["backend"] for each in before} - {each["backend"] for each in after}
    for name in gone:  # not one after the other: each may have requests of its own to finish
        serve.delete(name, _blocking=False)
    while gone & set(serve.status().applications):  # each has its drain_seconds; Serve's own wait gives up after 60 s
        time.sleep(0.5)
    replaced = {each["name"]: each for each in before}
    return [_line(each, replaced.get(each["name"])) for each in after if each["backend"] in plans]


def merged(before: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Routes after an update: new ones take the place of those of the same name, and are compared with a base that is
    served already, where none came with them.
    """
    after = {each["name"]: dict(each) for each in (*before, *new)}  # in the order of `before`
    bases = {each["details"]["base"]: name for name, each in after.items() if each["details"]["run"] is None}
    for each in new:
        if each["details"]["run"] is not None:
            after[each["name"]]["compare"] = each["compare"] or bases.get(each["details"]["base"])
    return list(after.values())


def _line(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    name = after["name"]
    if before is None:
        return f"{name} is new: {_origin(after)}"
    if before["backend"] == after["backend"]:
        return f"{name} answers as before: {_origin(after)}"
    return f"{name} is now {_origin(after)}; it was {_origin(before)}"


def _origin(route: Mapping[str, Any]) -> str:
    details = route["details"]
    return f"the base {details['base']}" if details["run"] is None else f"{details['run']}, step {details['step']}"


def switch(
    fields: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    keys: Mapping[str, str],
    listen: tuple[str, int],
) -> None:
    """Give the gateway other routes, without a restart; returns once it uses them.

    Raises:
        ServeError: it did not take them.
    """
    from ray import serve

    deploy_gateway(fields, settings, keys, listen)
    handle, wanted = serve.get_app_handle(app.APPLICATION), {each["name"]: each["backend"] for each in fields}
    deadline = time.monotonic() + SWITCH_SECONDS
    while {each["name"]: each["backend"] for each in handle.fields.remote().result(timeout_s=SWITCH_SECONDS)} != wanted:
        if time.monotonic() > deadline:
            raise ServeError(
                f"the gateway did not take its new routes within {SWITCH_SECONDS} s: "
                f"{serve.status().applications[app.APPLICATION].message}"
            )
        time.sleep(0.1)


def deploy_gateway(
    fields: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    keys: Mapping[str, str],
    listen: tuple[str, int],
) -> None:
    """The gateway with these routes; one that runs is told of them, and keeps running."""
    from ray import serve

    from serving.endpoint import Endpoint

    options = app.gateway_options(fields)
    # Where people connect: the head node, whose address they know.
    options["ray_actor_options"]["resources"] = {"node:__internal_head__": 0.001}
    # Without a version of its own, each deployment of the same class counts as new code, and replaces the replica.
    gateway = serve.deployment(Endpoint, name="gateway", **options).options(version="1", _internal=True)
    serve.run_many(
        [serve.RunTarget(gateway.bind(settings, keys, listen), name=app.APPLICATION, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def failure(message: str, logs: Path, what: str = "model") -> ServeError:
    """The cause of a failed start, from what Serve was told and what the replica's processes wrote."""
    found, before = cause(message, logs, LOG_TAIL)
    if "No module named 'serving'" in message:
        found = "the cluster's nodes do not have this package installed"
    shown = "".join(f"\n    {line}" for line in before)
    return ServeError(
        f"the {what} did not start: {found}{shown}",
        [
            f"the whole log is in {logs}",
            *(["check the model's folder: ray-ft export RUN writes it again"] if what == "model" else []),
        ],
    )
