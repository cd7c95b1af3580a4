"""cluster/kuberay as `kubectl kustomize` renders it: valid by KubeRay's definitions, and what Ray and we read from it.

Rendering needs kubectl 1.27 or later (kustomize 5). There is no Kubernetes here: what the operator does with the files
is not tested.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

import ray_ft.recipe
from ray_ft.placement import nodes
from tests.unit import kuberay_schema
from tests.unit.kuberay_rules import (
    FOLDER,
    OVERLAYS,
    Docs,
    container,
    containers,
    needs_kubectl,
    pods,
    ray_cluster,
    render,
    rendered,
    the,
    wrong,
)

SCHEMA = json.loads(kuberay_schema.FILE.read_text())

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def strict(required: Sequence[str] = (), /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def version(name: str) -> dict[str, Any]:
    return {"const": name}


SELECTOR = strict(matchLabels=TEXTS)
PEER = strict(podSelector=SELECTOR, namespaceSelector=SELECTOR)
PORT = strict(["protocol", "port"], protocol={"enum": ["TCP", "UDP"]}, port={"type": "integer"})
RULE = strict((), **{"from": {"type": "array", "items": PEER}, "ports": {"type": "array", "items": PORT}})
#: Kubernetes' own objects, as far as they are used here (Kubernetes API reference, v1.32).
KINDS: dict[str, dict[str, Any]] = {
    "Namespace": {"apiVersion": version("v1")},
    "ServiceAccount": {"apiVersion": version("v1")},
    "ConfigMap": {"apiVersion": version("v1"), "data": TEXTS},
    "PriorityClass": {
        "apiVersion": version("scheduling.k8s.io/v1"),
        "value": {"type": "integer", "maximum": 1_000_000_000},
        "preemptionPolicy": {"enum": ["Never", "PreemptLowerPriority"]},
        "description": {"type": "string"},
    },
    "PodDisruptionBudget": {
        "apiVersion": version("policy/v1"),
        "spec": strict(["minAvailable", "selector"], minAvailable={"type": "integer"}, selector=SELECTOR),
    },
    "NetworkPolicy": {
        "apiVersion": version("networking.k8s.io/v1"),
        "spec": strict(
            ["podSelector", "policyTypes"],
            podSelector=SELECTOR,
            policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            ingress={"type": "array", "items": RULE},
        ),
    },
}


def invalid(doc: dict[str, Any]) -> list[str]:
    """What is wrong with an object by its kind's schema: where, and what."""
    if doc["kind"] in SCHEMA["kinds"]:
        schema = SCHEMA["kinds"][doc["kind"]] | {"$defs": SCHEMA["$defs"]}
    else:
        fields = {"kind": {}, "metadata": kuberay_schema.METADATA} | KINDS[doc["kind"]]
        schema = strict(["apiVersion", "kind", "metadata"], **fields)
    found = jsonschema.Draft202012Validator(schema).iter_errors(doc)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


@needs_kubectl
@pytest.mark.parametrize("name", ["setup", *OVERLAYS])
def test_what_is_rendered_is_valid(name: str) -> None:
    for doc in rendered(name):
        assert invalid(doc) == [], doc["metadata"]["name"]


SCHEMA_FAULTS: dict[str, tuple[Callable[[Docs], Any], str]] = {
    "a misspelt field of a pod": (lambda d: container(d).update(imagePullPolcy="Always"), "'imagePullPolcy'"),
    "a misspelt field of the cluster": (lambda d: ray_cluster(d).update(enableInTreeAutoscalling=True), "Autoscalling"),
    "text for a number": (lambda d: ray_cluster(d)["workerGroupSpecs"][0].update(minReplicas="0"), "minReplicas"),
    "a number for text": (
        lambda d: ray_cluster(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "num-cpus",
    ),
    "a number for a variable": (lambda d: container(d)["env"].append({"name": "A", "value": 1}), "env"),
    "an unknown mode": (lambda d: ray_cluster(d)["authOptions"].update(mode="tokens"), "authOptions.mode"),
    "no name of a group": (lambda d: ray_cluster(d)["workerGroupSpecs"][0].pop("groupName"), "'groupName'"),
    "no containers": (lambda d: pods(d)["head"]["spec"].pop("containers"), "'containers'"),
    "an old version": (lambda d: d[-1].update(apiVersion="ray.io/v1alpha1"), "apiVersion"),
    "no quantity": (lambda d: container(d)["resources"]["limits"].update(memory="lots"), "limits.memory"),
    "a label that is a number": (lambda d: pods(d)["cpu"]["metadata"]["labels"].update(a=1), "metadata.labels.a"),
    "a policy that is misspelt": (
        lambda d: the(d, "PodDisruptionBudget")["spec"].update(minAvailabel=1),
        "minAvailabel",
    ),
}


@needs_kubectl
@pytest.mark.parametrize("fault", SCHEMA_FAULTS)
def test_the_schema_finds(fault: str) -> None:
    docs = rendered("train")
    plant, said = SCHEMA_FAULTS[fault]
    plant(docs)
    found = [problem for doc in docs for problem in invalid(doc)]
    assert len(found) == 1, found
    assert said in found[0]


def test_the_schema_is_made_of_the_operator_s_definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small definition: what occurs twice is written once, unknown fields are refused."""
    pod = {
        "type": "object",
        "description": "long",
        "required": ["image"],
        "properties": {
            "image": {"type": "string", "pattern": "^[a-z/.:0-9-]+$"},
            "port": {"x-kubernetes-int-or-string": True},
        },
    }
    top = {
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "status": {"type": "object"},
            "spec": {"type": "object", "properties": {"head": pod, "workers": {"type": "array", "items": pod}}},
        },
    }
    names = {"group": "ray.io", "names": {"kind": "Thing"}}
    crd = {"spec": names | {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": top}}]}}
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    monkeypatch.setattr(kuberay_schema, "FILE", tmp_path / "made.json")
    monkeypatch.setattr(sys, "argv", ["", "v9", str(tmp_path / "crd.yaml")])
    kuberay_schema.main()

    made = json.loads((tmp_path / "made.json").read_text())
    assert "v9" in made["source"] and "long" not in json.dumps(made)
    assert json.dumps(made).count("a-z/.:0-9-") == 1
    check = jsonschema.Draft202012Validator(made["kinds"]["Thing"] | {"$defs": made["$defs"]})
    good = {"apiVersion": "ray.io/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": {"head": {"image": "a:1"}}}
    assert check.is_valid(good)
    assert not check.is_valid(good | {"status": {}})
    assert not check.is_valid(good | {"spec": {"workers": [{"image": "a:1", "prot": 1}]}})
    assert not check.is_valid(good | {"spec": {"workers": [{"port": 1}]}})
    assert check.is_valid(good | {"spec": {"workers": [{"image": "a:1", "port": "http"}]}})


@needs_kubectl
def test_another_image_for_all_pods_is_one_line(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    shutil.copytree(FOLDER, tmp_path / "kuberay")
    overlay.mkdir()
    image = {"name": "registry.example.com/ray-ft", "newName": "ghcr.io/me/ray-ft", "newTag": "7"}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["../kuberay/train"], "images": [image]}))
    assert {ray["image"] for doc in render(overlay) for ray in containers(doc)} == {"ghcr.io/me/ray-ft:7"}


@needs_kubectl
def test_the_fabric_of_aws_is_for_gpu_pods(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / "train" / "kustomization.yaml"
    file.write_text(file.read_text().replace("components: [", "components: [../efa, "))
    docs = render(tmp_path / "kuberay" / "train")
    assert [problem for doc in docs for problem in invalid(doc)] == []
    assert list(wrong(docs, rendered("setup"))) == []
    limits = {name: pod["spec"]["containers"][0]["resources"]["limits"] for name, pod in pods(docs).items()}
    assert {name for name, one in limits.items() if "vpc.amazonaws.com/efa" in one} == {"gpu", "gpu-spot"}


@needs_kubectl
def test_our_own_reader_sees_what_the_cluster_may_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """`placement.nodes` asks Kubernetes for one RayCluster, and KubeRay lets the head's account do that."""
    from ray.autoscaler._private.kuberay import node_provider

    asked = []

    class Client:
        def __init__(self, namespace: str) -> None:
            asked.append(namespace)

        def get(self, path: str) -> dict[str, Any]:
            asked.append(path)
            return the(rendered("cluster"), "RayCluster")

    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", Client)
    monkeypatch.setattr(nodes.Path, "read_text", lambda self: "ray-ft\n")
    config = nodes._kuberay("ray-ft")
    assert asked == ["ray-ft", "rayclusters/ray-ft"]
    types = config["available_node_types"]
    assert {
        name: (one["resources"]["CPU"], one["resources"].get("GPU", 0), one["max_workers"])
        for name, one in types.items()
    } == {
        "headgroup": (0, 0, 0),
        "cpu": (14, 0, 8),
        "gpu": (160, 8, 4),
        "gpu-spot": (160, 8, 0),
    }
    assert config["idle_timeout_minutes"] == 5


@needs_kubectl
def test_the_job_trains_a_recipe_that_is_there(tmp_path: Path) -> None:
    job = the(rendered("train"), "RayJob")["spec"]
    program, verb, path = job["entrypoint"].split()
    assert (program, verb) == ("ray-ft", "train")
    head = pods(rendered("train"))["head"]["spec"]
    mount = next(one for one in head["containers"][0]["volumeMounts"] if one["name"] == "recipe")
    folder, _, file = path.rpartition("/")
    assert folder == mount["mountPath"]
    (tmp_path / file).write_text(the(rendered("train"), "ConfigMap")["data"][file])
    recipe = ray_ft.recipe.load(str(tmp_path / file))
    assert recipe.train.device == "cuda"  # nothing can be derived from GPUs that are still to come
    assert "://" in recipe.run.storage


@needs_kubectl
def test_the_service_is_one_that_serve_and_our_application_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serving import app

    service = the(rendered("serve"), "RayService")["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(config)
    assert parsed.http_options.port == 8000  # as the head's container names it, where KubeRay looks
    [application] = parsed.applications
    module, _, attribute = application.import_path.partition(":")
    assert (module, getattr(app, attribute)) == ("serving.app", app.build)
    app.check_args(application.args)
    # Plans are made from the GPUs that are there when the application is built, which waits until the head has started.
    scripts = the(rendered("setup"), "ConfigMap")
    assert container(rendered("serve"), "head")["startupProbe"]["exec"]["command"][1] == "/etc/ray-ft/bin/gpus.py"
    assert (scripts["metadata"]["name"], sorted(scripts["data"])) == ("ray-ft-bin", ["gpus.py", "leave.py"])
    for file, text in scripts["data"].items():
        compile(text, file, "exec")
    assert {group["groupName"]: group["minReplicas"] for group in service["rayClusterConfig"]["workerGroupSpecs"]}[
        "gpu"
    ] == 1
    assert all(pod["spec"]["priorityClassName"] == "ray-ft-online" for pod in pods(rendered("serve")).values())


@pytest.fixture(scope="module")
def leave() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leave", FOLDER / "setup" / "leave.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pod_that_goes_knows_what_runs_on_it(leave: ModuleType) -> None:
    """By the names in the process table: a task counts, a worker that idles does not."""

    def process(title: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", "-c", f"exec -a '{title}' sleep 60"])

    title = f"ray::Canary{os.getpid()}.run"  # another run of these tests may have one too
    busy, idle = process(title), process("ray::IDLE canary")
    try:
        until = time.monotonic() + 30
        while title not in leave.at_work() and time.monotonic() < until:
            time.sleep(0.05)
        assert title in leave.at_work()
        assert not [other for other in leave.at_work() if other.startswith("ray::IDLE")]
    finally:
        for one in (busy, idle):
            one.kill()
            one.wait()
    assert title not in leave.at_work()


def test_no_file_names_an_image_but_one() -> None:
    naming = [
        path for path in FOLDER.rglob("*.yaml") if re.search(r"registry\.|ghcr\.|docker\.io|:latest", path.read_text())
    ]
    assert naming == [FOLDER / "base" / "kustomization.yaml"]
