"""The doctor's checks: each planted fault is found by its name, and well nodes give none."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ray_ft import placement, session
from ray_ft.cli import app
from ray_ft.demo import DemoPaths
from ray_ft.doctor import (
    auth,
    checkup,
    clock,
    examine,
    looks,
    model,
    place,
    probe,
    quick,
    room,
    show,
    storage,
    versions,
)
from ray_ft.doctor.finding import Finding, Severity, names, worst
from ray_ft.doctor.probe import Answer, Node
from ray_ft.errors import CredentialError, ResourceError
from ray_ft.recipe import Recipe
from ray_ft.view import View

MIB, GIB = 1 << 20, 1 << 30


def nodes(count: int = 3, gpus: int = 0) -> list[Node]:
    resources = {"CPU": 8.0, "GPU": float(gpus), "object_store_memory": 2.0 * GIB}
    return [Node(f"10.0.0.{n + 1}", f"{n:06x}", f"10.0.0.{n + 1}", n == 0, resources) for n in range(count)]


def found(findings: list[Finding]) -> dict[str, Finding]:
    """What is not well, by name."""
    assert all(finding.ways_out for finding in findings if finding.severity >= Severity.WARNING)
    return {finding.name: finding for finding in findings if finding.severity >= Severity.WARNING}


# ---------------------------------------------------------------------------------------------------------- findings


def test_a_warning_without_a_way_out_is_refused() -> None:
    with pytest.raises(ValueError, match="says no way out"):
        Finding("x", Severity.WARNING, "here", "bad")
    assert worst([]) is Severity.OK
    assert worst([Finding("a", Severity.NOTE, "", ""), Finding("b", Severity.OK, "", "")]) is Severity.NOTE
    assert names(f"n{i}" for i in range(9)) == "n0, n1, n2 and 6 more"


# ---------------------------------------------------------------------------------------------------------- versions


HAVE = versions.look()


def facts(**changed: str) -> dict[str, str]:
    return HAVE | changed


def test_equal_versions_are_well() -> None:
    said = {"a": facts(), "b": facts(), versions.HERE: facts()}
    (finding,) = versions.check(said, [])
    assert finding.severity is Severity.OK
    assert f"ray {facts()['ray']}" in finding.what


@pytest.mark.parametrize("package", ["Python", "ray-ft", "ray", "torch", "transformers", "vllm"])
def test_another_version_on_one_node(package: str) -> None:
    said = {"a": facts(), "b": facts(**{package: "0.0.1"}), versions.HERE: facts()}
    (finding,) = versions.check(said, [])
    assert finding.name == f"versions.{package}"
    assert finding.severity is Severity.ERROR
    assert finding.where == "b"
    assert "0.0.1 on b" in finding.what


def test_other_code_of_the_same_version() -> None:
    said = {"a": facts(), "b": facts(), versions.HERE: facts(**{versions.CODE: "edited"})}
    (finding,) = versions.check(said, [])
    assert (finding.name, finding.where) == ("versions.ray-ft_code", versions.HERE)


def test_builds_for_other_devices_differ_only_among_gpu_nodes() -> None:
    said = {"cpu": facts(torch="2.13.0+cpu"), "gpu": facts(torch="2.13.0+cu130"), versions.HERE: facts(torch="2.13.0")}
    assert not found(versions.check(said, ["gpu"]))
    assert "versions.torch" in found(versions.check(said, ["gpu", "cpu"]))


def test_a_node_without_deepspeed() -> None:
    said = {"a": facts(), "b": facts(deepspeed=""), versions.HERE: facts()}
    (finding,) = versions.check(said, [])
    assert (finding.name, finding.severity, finding.where) == ("versions.deepspeed", Severity.WARNING, "b")
    assert not found(versions.check(said, ["a"]))  # b only prepares data


# ----------------------------------------------------------------------------------------------------------- storage


def visit(folders: list[str], sample: int = 0) -> list[Finding]:
    """The rounds of `storage.examine`, where each node sees run.storage at a folder of its own."""
    names_ = [f"n{number}" for number in range(len(folders))]
    at = [str(Path(folder, ".doctor-x")) for folder in folders]
    written = {name: Answer(storage.write(at[n], n, sample)) for n, name in enumerate(names_)}
    there = [n for n, name in enumerate(names_) if storage._wrote(written[name])]
    seen = {}
    for n, name in enumerate(names_):
        # What another wrote under its own name of the folder has that name in it: read as the same place.
        seen[name] = Answer(storage.read(at[n], storage._others(n, there), storage._neighbour(n, there, sample)))
    for folder in at:
        storage.clean(folder)
    return storage.check("/runs", names_, written, seen, sample)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.3)


def test_shared_storage_is_well_and_left_as_it_was(tmp_path: Path, hasty: None) -> None:
    (finding,) = visit([str(tmp_path)] * 3, sample=1 << 20)
    assert finding.severity is Severity.OK
    assert "MB/s" in finding.what
    assert list(tmp_path.iterdir()) == []


def test_storage_that_is_a_folder_of_each_node(tmp_path: Path, hasty: None) -> None:
    finding = found(visit([str(tmp_path / name) for name in "abc"]))["storage.shared"]
    assert finding.severity is Severity.ERROR
    assert finding.where == "n0, n1, n2"


def test_storage_that_one_node_lacks(tmp_path: Path, hasty: None) -> None:
    finding = found(visit([str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "b")]))["storage.shared"]
    assert finding.where == "n2"


def test_storage_that_one_node_cannot_write_to(tmp_path: Path, hasty: None) -> None:
    (tmp_path / "file").write_text("in the way")
    finding = found(visit([str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "file")]))["storage.writable"]
    assert finding.where == "n2"
    assert "NotADirectory" in finding.what


def test_slow_storage() -> None:
    written = {
        "n0": Answer({"error": "", "seconds": 9.0, "rate": 0.0}),
        "n1": Answer({"error": "", "seconds": 0.0, "rate": 1e6}),
    }
    seen = {name: Answer({"unseen": {}, "seconds": 0.0, "rate": 2e8}) for name in written}
    finding = found(storage.check("/runs", list(written), written, seen, 1 << 20))["storage.slow"]
    assert finding.severity is Severity.WARNING
    assert "9.0 s" in finding.what
    assert "n1 writes 1.0 MB/s" in finding.what


# -------------------------------------------------------------------------------------------------------------- room


def space(
    shm: int = 8 * GIB, shm_free: int | None = None, disk_free: int = 100 * GIB, files: int = 65536
) -> dict[str, Any]:
    disk = {"folder": "/tmp/ray/session", "total": 200 * GIB, "free": disk_free}
    return {
        "shm": {"total": shm, "free": shm if shm_free is None else shm_free},
        "disks": {"Ray's logs and spilled objects": disk},
        "files": files,
        "most_files": 1 << 20,
    }


@pytest.mark.parametrize(
    ("facts", "gpus", "name", "severity"),
    [
        (space(shm_free=MIB), 0, "room.shm", Severity.ERROR),
        (space(shm=64 * MIB), 0, "room.shm", Severity.WARNING),
        (space(shm=5 * GIB // 2), 8, "room.shm", Severity.WARNING),  # the object store alone would fit
        (space(disk_free=9 * GIB), 0, "room.disk", Severity.ERROR),
        (space(disk_free=100 * MIB), 0, "room.disk", Severity.ERROR),
        (space(files=1023), 0, "room.open_files", Severity.ERROR),
        (space(files=4096), 0, "room.open_files", Severity.WARNING),
    ],
)
def test_too_little_room(facts: dict[str, Any], gpus: int, name: str, severity: Severity) -> None:
    well, ill, _ = nodes(3, gpus)
    bad = found(room.check({well.name: (well, space()), ill.name: (ill, facts)}))
    assert list(bad) == [name]
    assert (bad[name].severity, bad[name].where) == (severity, ill.name)


def test_room_enough() -> None:
    assert not found(room.check({node.name: (node, space(files=-1)) for node in nodes(gpus=8)}))
    here = room.look()
    assert 0 < here["shm"]["free"] <= here["shm"]["total"]
    assert here["disks"]["downloaded models"]["free"] > 0


# ------------------------------------------------------------------------------------------------------------- clock


def test_a_clock_that_is_off_beyond_doubt() -> None:
    first = {"a": Answer(ahead=0.4, slack=0.5), "b": Answer(ahead=31.0, slack=0.5), "c": Answer(ahead=-1.4, slack=0.5)}
    bad = clock.check([first])
    assert [(one.name, one.where, one.severity) for one in bad] == [("clock.skew", "b", Severity.WARNING)]
    assert clock.check([{"b": Answer(ahead=-100.0, slack=1.0)}])[0].severity is Severity.ERROR
    more = {"b": Answer(ahead=3.0, slack=5.0), "c": Answer(ahead=-1.4, slack=0.01), "a": Answer(error="silent")}
    assert sorted(one.where for one in clock.check([first, more])) == ["b", "c"]  # the most exact answer counts


def test_a_clock_is_compared_across_the_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sent at 100, begun there at 1103 and ended at 1113, back at 113: each way 1.5 s, and 1001.5 s ahead.
    answer = probe._answer(100.0, ("x", "", 1103.0, 1113.0), 113.0)
    assert answer.ahead == pytest.approx(1001.5)
    assert answer.slack == pytest.approx(1.5)
    assert answer.value == "x"
    said = probe.ask([probe.here()], time.monotonic)
    assert abs(said[probe.here().name].ahead) < 1


# ------------------------------------------------------------------------------------------------------------- model


def test_a_model_that_all_nodes_have(demo: DemoPaths) -> None:
    there = model.look(demo.base)
    assert not found(model.check(demo.base, {"a": there, "b": model.look(demo.base)}, ["a", "b"]))


def test_a_model_that_one_node_lacks(demo: DemoPaths) -> None:
    lacking = model.look("/nowhere/model")
    bad = found(model.check(demo.base, {"a": model.look(demo.base), "b": lacking}, ["a", "b"]))
    assert bad["model.reachable"].where == "b"
    assert bad["model.reachable"].severity is Severity.ERROR
    assert "copy the folder" in bad["model.reachable"].ways_out[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda files: files.pop("model.safetensors"), "model.complete"),
        (lambda files: files.pop("tokenizer.json"), "model.complete"),
        (lambda files: files.update({"config.json": "other"}), "model.same"),
        (lambda files: files.update({"model.safetensors": 5}), "model.same"),
    ],
)
def test_a_model_that_differs_on_one_node(demo: DemoPaths, change: Callable[[dict[str, Any]], Any], name: str) -> None:
    there, other = model.look(demo.base), model.look(demo.base)
    change(other["files"])
    other["weights"] = "model.safetensors" in other["files"]
    bad = found(model.check(demo.base, {"a": there, "b": other, "c": there}, ["a", "b", "c"]))
    assert bad[name].where == "b"
    if name == "model.complete" and not other["weights"]:  # a node that only prepares data needs no weights
        assert "model.complete" not in found(model.check(demo.base, {"a": there, "b": other}, ["a"]))


def test_weights_that_are_still_to_come_are_a_note(demo: DemoPaths) -> None:
    later = model.look(demo.base) | {"weights": False, "local": False}
    later["files"].pop("model.safetensors")
    findings = model.check("org/model", {"a": later}, ["a"])
    assert [one.name for one in findings if one.severity is Severity.NOTE] == ["model.weights"]
    assert not found(findings)


# -------------------------------------------------------------------------------------------------------------- auth


def guarded(**changed: Any) -> dict[str, Any]:
    well = {"mode": "token", "token_file": "/root/.ray/auth_token", "token_bits": 0o600}
    return well | {"kubernetes": False, "dashboard": []} | changed


@pytest.mark.parametrize(
    ("facts", "name", "severity"),
    [
        (guarded(mode="disabled"), "auth.token", Severity.WARNING),
        (guarded(token_bits=0o644), "auth.token_file", Severity.WARNING),
        (guarded(dashboard=["0.0.0.0"]), "auth.dashboard", Severity.WARNING),
    ],
)
def test_what_lets_others_in(facts: dict[str, Any], name: str, severity: Severity) -> None:
    bad = found(auth.check({"head": facts, "b": guarded()}, "head", anyone=False, private=False))
    assert {key: one.severity for key, one in bad.items()} == {name: severity}
    assert bad[name].where == "head"


def test_a_cluster_that_answers_anyone_is_open_whatever_its_nodes_say() -> None:
    bad = found(auth.check({"head": guarded()}, "head", anyone=True, private=False))
    assert bad["auth.token"].severity is Severity.WARNING


def test_a_guarded_cluster_is_well() -> None:
    head = guarded(dashboard=["127.0.0.1"])
    assert not found(auth.check({"head": head, "b": guarded()}, "head", anyone=False, private=False))
    pod = guarded(token_bits=0o440, kubernetes=True, dashboard=["0.0.0.0"])
    assert not found(auth.check({"head": pod}, "head", anyone=None, private=False))
    assert not found(auth.check({"here": guarded(mode="disabled")}, "here", anyone=None, private=True))


def test_the_token_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("t")
    file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert auth.look()["token_bits"] == 0o644


# --------------------------------------------------------------------------------------------------------- placement


def test_workers_that_can_never_be_placed(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("train.workers=2")

    def refuse(recipe: Recipe, say: Callable[[str], None]) -> None:
        raise ResourceError("too large", ["smaller"])

    monkeypatch.setattr(placement, "refuse_impossible", refuse)
    (finding,) = place.check(recipe)
    assert (finding.name, finding.severity, finding.ways_out) == ("placement.workers", Severity.ERROR, ("smaller",))
    monkeypatch.setattr(placement, "refuse_impossible", lambda recipe, say: say("two nodes are on their way"))
    assert place.check(recipe)[0].severity is Severity.NOTE
    monkeypatch.setattr(placement, "refuse_impossible", lambda recipe, say: None)
    assert place.check(recipe)[0].severity is Severity.OK


# --------------------------------------------------------------------------------------------------------- the whole


def test_a_node_that_does_not_answer_is_found() -> None:
    first, second = nodes(2)
    well = {part: {"facts": {}} for part in looks.PARTS}
    answers = {first.name: Answer(well), second.name: Answer(error="ModuleNotFoundError: No module named 'ray_ft'")}
    findings, facts_ = checkup._sort([first, second], answers)
    (finding,) = findings
    assert (finding.name, finding.severity, finding.where) == ("nodes.answer", Severity.ERROR, second.name)
    assert "No module named 'ray_ft'" in finding.what
    assert list(facts_["room"]) == [first.name]


def test_a_part_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(5, "no /proc here")

    monkeypatch.setitem(looks.PARTS, "room", fail)
    said = looks.look(None)
    assert "no /proc here" in said["room"]["failed"]
    assert all("facts" in of for part, of in said.items() if part != "room")
    findings, _ = checkup._sort([probe.here()], {probe.here().name: Answer(said)})
    assert [one.name for one in findings] == ["room.looked_at"]


def test_here_without_ray(make_recipe: Callable[..., Recipe]) -> None:
    view = View(Console(file=io.StringIO()))
    recipe = make_recipe()
    findings = examine(recipe, view)
    assert not [one for one in found(findings) if not one.startswith(("gpus.", "room."))]
    assert {"storage", "model", "versions"} <= {one.name for one in findings}
    gone = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "/nowhere/model"})})
    with pytest.raises(ResourceError, match=r"model\.reachable on .*/nowhere/model"):
        quick(gone, view)


def test_quick_is_quick_and_says_warnings(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, file=io.StringIO(), width=300)
    recipe = make_recipe()
    quick(recipe, View(console))  # what is imported once is not counted
    began = time.process_time()
    quick(recipe, View(console))
    assert time.process_time() - began < 2
    small = {"folder": "/models", "total": 1 * GIB, "free": 400 * MIB}
    monkeypatch.setitem(looks.PARTS, "room", lambda: space() | {"disks": {"downloaded models": small}})
    quick(recipe, View(console))
    assert "the disk of /models (downloaded models) is 61% full: 400 MiB free; delete" in console.export_text()


def test_shown_worst_first_and_as_json() -> None:
    findings = [
        Finding("room", Severity.OK, "3 nodes", "enough"),
        Finding("storage.shared", Severity.ERROR, "10.0.0.2", "[not] shared", ("mount it", "use s3://")),
        Finding("clock.skew", Severity.WARNING, "10.0.0.3", "2 s off", ("chronyd",)),
    ]
    console = Console(record=True, file=io.StringIO(), width=120)
    show.show(findings, View(console))
    text = console.export_text()
    assert text.index("storage.shared") < text.index("clock.skew") < text.index("enough")
    assert "[not] shared" in text
    assert "→ mount it" in text
    assert text.strip().endswith("doctor: 1 error, 1 warning, 1 fine")
    answer = json.loads(json.dumps(show.as_json(findings)))
    assert answer["worst"] == "error"
    assert answer["findings"][1]["ways_out"] == ["mount it", "use s3://"]


def test_a_pinned_revision_is_what_nodes_look_for(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("model.path=org/model", "model.revision=v1")
    assert checkup._model_to_look_for(recipe, quick=False) == "org/model@v1"
    assert checkup._model_to_look_for(recipe, quick=True) is None  # the quick part asks no hub
    local = make_recipe()
    assert checkup._model_to_look_for(local, quick=True) == local.model.path


def test_a_node_that_leaves_while_it_is_asked_ends_no_run(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spot machines go at any moment; one that stays and fails is another matter."""
    stays, leaves = nodes(2)
    there, asked = [stays, leaves], list[int]()
    lost = Finding("nodes.answer", Severity.ERROR, leaves.name, "cannot be looked at: it died", ("start it again",))

    def look(*_: object, **more: object) -> list[Finding]:
        asked.append(len(there))
        if len(asked) == 1:
            there.remove(leaves)
        return [lost] if asked[-1] == 2 else []

    monkeypatch.setattr(probe, "nodes", lambda **_: list(there))
    monkeypatch.setattr(checkup, "_look", look)
    quick(make_recipe(), View(Console(file=io.StringIO())))
    assert asked == [2, 1]
    there.append(leaves)
    with pytest.raises(ResourceError, match="it died"):
        quick(make_recipe(), View(Console(file=io.StringIO())))
    assert asked == [2, 1, 2]


@pytest.mark.parametrize("error", [ResourceError("no cluster"), CredentialError("it asks for a token")])
def test_a_cluster_that_cannot_be_joined_is_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(session, "connected", refuse)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 2, done.output
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["name"], finding["what"]) == ("cluster.reached", str(error))
