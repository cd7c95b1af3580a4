"""The whole examination: asks every node, gives each check what the nodes said, and sorts what they find.

The quick part, which `train` runs itself, is one question and a small file from each node. The whole one also moves a
sample through the run's storage, knocks at the head without a token, and measures the network between the nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ray_ft import paths, session
from ray_ft.doctor import auth, clock, fabric, gpus, looks, model, network, place, probe, room, storage, versions
from ray_ft.doctor.finding import Finding, Severity, names, worst
from ray_ft.doctor.probe import Answer, Node
from ray_ft.errors import RayFtError, ResourceError
from ray_ft.recipe import Recipe
from ray_ft.view import View

#: Seconds for a node to answer the whole question; a model's small files may have to come from the hub first.
LOOK_SECONDS = 180.0
#: Times that `train` looks, at most, while nodes come and go.
LOOKS = 3


def examine(recipe: Recipe | None, view: View, *, quick: bool = False) -> list[Finding]:
    """See `ray_ft.doctor.examine`."""
    findings = _look(recipe, view, quick)
    if recipe is not None and not recipe.train.in_process and any(node.resources for node in probe.nodes()):
        findings += place.check(recipe)
    return sorted(findings, key=lambda finding: (-finding.severity, finding.name, finding.where))


def _look(recipe: Recipe | None, view: View, quick: bool) -> list[Finding]:
    """All but the room for the recipe's workers."""
    private = not session.address()
    nodes = probe.nodes(start_nothing=quick)
    path = _model_to_look_for(recipe, quick)
    answers = probe.ask(nodes, looks.look, path, seconds=LOOK_SECONDS)
    findings, facts = _sort(nodes, answers)
    rounds: list[Mapping[str, Answer]] = [answers]
    present = [node for node in nodes if not answers[node.name].error]
    if recipe is not None and not (quick and private):  # where it can fail; `train` tries its own storage first
        found, more = storage.examine(present, recipe.run.storage, quick=quick)
        findings += found
        rounds += more
    elif recipe is None:
        what = "run.storage, model.path and room for workers are those of a recipe, and none is given"
        findings.append(Finding("recipe", Severity.NOTE, "here", what))
    findings += _checks(nodes, facts, private)
    findings += clock.check(rounds) if len(nodes) > 1 else []
    if path is not None and "model" in facts:
        findings += model.check(path, facts["model"], _working(recipe, present))
    connected = any(node.resources for node in nodes)
    head = next((node.name for node in nodes if node.head), nodes[0].name)
    anyone = auth.answers_anyone(_head_address()) if not (quick or private) else None
    findings += auth.check(facts.get("auth", {}), head, anyone=anyone, private=private) if connected else []
    if not quick and sum(max(node.gpus, 1) for node in present if node.resources) > 1:
        findings += _measured(view, facts)
    return findings


def quick(recipe: Recipe, view: View) -> None:
    """See `ray_ft.doctor.quick`."""
    for _ in range(LOOKS):
        asked = {node.id for node in probe.nodes(start_nothing=True)}
        findings = _look(recipe, view, quick=True)
        there = {node.id for node in probe.nodes(start_nothing=True)}
        if worst(findings) < Severity.ERROR or asked <= there:
            break  # else a node that was asked has left meanwhile: spot machines do, and no run fails for that
    for finding in findings:
        if finding.severity == Severity.WARNING:
            view.line(f"warning: {finding.where}: {finding.what}; {finding.ways_out[0]}")
    errors = [finding for finding in findings if finding.severity == Severity.ERROR]
    if errors:
        raise ResourceError(
            "; ".join(f"{finding.name} on {finding.where}: {finding.what}" for finding in errors),
            [*dict.fromkeys(way for finding in errors for way in finding.ways_out), "ray-ft doctor looks at all of it"],
        )


def _model_to_look_for(recipe: Recipe | None, quick: bool) -> str | None:
    """The model's path, if it is to be looked for; the quick part fetches nothing over a network."""
    if recipe is None:
        return None
    path = recipe.model.location
    return path if not quick or (not paths.is_uri(path) and path.startswith(("/", "."))) else None


def _sort(nodes: Sequence[Node], answers: Mapping[str, Answer]) -> tuple[list[Finding], dict[str, dict[str, Any]]]:
    """Findings about nodes that did not answer, and what the others said by part and node."""
    findings = []
    facts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    silent: defaultdict[str, list[str]] = defaultdict(list)
    failed: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for node in nodes:
        answer = answers[node.name]
        if answer.error:
            silent[answer.error].append(node.name)
            continue
        for part, said in answer.value.items():
            if "failed" in said:
                failed[part, said["failed"]].append(node.name)
            else:
                facts[part][node.name] = said["facts"]
    for why, where in silent.items():
        ways = (
            "the same ray-ft has to be installed on every node, or come with the job (ray-ft submit)",
            "see that node's logs, in Ray's temporary folder: session_latest/logs; start Ray there again",
        )
        findings.append(Finding("nodes.answer", Severity.ERROR, names(where), f"cannot be looked at: {why}", ways))
    for (part, why), where in failed.items():
        way = f"look at {part} on that node by hand: nothing else is said of it"
        findings.append(Finding(f"{part}.looked_at", Severity.WARNING, names(where), f"{part}: {why}", (way,)))
    return findings, dict(facts)


def _checks(nodes: Sequence[Node], facts: Mapping[str, dict[str, Any]], private: bool) -> list[Finding]:
    """The checks that need no recipe."""
    by_name = {node.name: node for node in nodes}
    findings: list[Finding] = []
    if said := facts.get("versions"):
        compared = said if private else {**said, versions.HERE: versions.look()}
        findings += versions.check(compared, [node.name for node in nodes if node.gpus])
    if said := facts.get("room"):
        findings += room.check({name: (by_name[name], its) for name, its in said.items()})
    if said := facts.get("network"):
        findings += network.check(said)
    if said := facts.get("gpus"):
        findings += gpus.check(said)
    return findings


def _working(recipe: Recipe | None, nodes: Sequence[Node]) -> list[str]:
    """The nodes that may have the recipe's workers."""
    with_gpus = [node.name for node in nodes if node.gpus]
    if with_gpus and recipe is not None and recipe.train.device != "cpu":
        return with_gpus
    return [node.name for node in nodes if node.resources.get("CPU", 0) or not node.id]


def _head_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def _measured(view: View, facts: Mapping[str, dict[str, Any]]) -> list[Finding]:
    try:
        measured = fabric.measure(view.line)
    except RayFtError as error:
        ways = error.ways_out or ("try again when the cluster is idle",)
        return [Finding("fabric.measured", Severity.WARNING, "cluster", error.what, ways)]
    return fabric.check(measured, facts.get("network", {}))
