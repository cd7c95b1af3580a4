"""What rendered files of cluster/kuberay must not be, beyond what their schema says: rule by rule."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
#: kind, and where in it the Ray cluster is.
OVERLAYS = {
    "cluster": ("RayCluster", ["spec"]),
    "train": ("RayJob", ["spec", "rayClusterSpec"]),
    "serve": ("RayService", ["spec", "rayClusterConfig"]),
}
GPU = "nvidia.com/gpu"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|(^|_)KEYS?($|_)")
#: KubeRay appends to the name, and refuses longer ones (MaxRayJobNameLength, MaxRayServiceNameLength).
LONGEST_NAME = 47

Docs = list[dict[str, Any]]


def why_not() -> str:
    """Why cluster/kuberay cannot be rendered here; nothing where it can."""
    if not shutil.which("kubectl"):
        return "no kubectl here, which renders cluster/kuberay"
    asked = ["kubectl", "version", "--client", "--output=json"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    version = json.loads(done.stdout or "{}").get("kustomizeVersion", "v0")
    return "" if int(version.lstrip("v").split(".")[0]) >= 5 else f"kubectl here has kustomize {version}, 5 is needed"


#: On what renders: nothing rendered is kept in the repository.
needs_kubectl = pytest.mark.skipif(bool(why_not()), reason=why_not())


def rendered(name: str) -> Docs:
    """The objects of a folder of cluster/kuberay; the caller's own to change."""
    return deepcopy(_rendered(name))


@functools.cache
def _rendered(name: str) -> Docs:
    return render(FOLDER / name)


def render(folder: Path) -> Docs:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def the(docs: Docs, kind: str) -> dict[str, Any]:
    [found] = [doc for doc in docs if doc["kind"] == kind]
    return found


def ray_cluster(docs: Docs) -> dict[str, Any]:
    """The specification of the Ray cluster in an overlay."""
    for kind, path in OVERLAYS.values():
        for doc in docs:
            if doc["kind"] == kind:
                for key in path:
                    doc = doc[key]
                return doc
    raise AssertionError("no Ray cluster")


def pods(docs: Docs) -> dict[str, dict[str, Any]]:
    """Pod templates by name of their group."""
    cluster = ray_cluster(docs)
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]} | workers


def container(docs: Docs, pod: str = "gpu") -> dict[str, Any]:
    """Ray's own container of a pod."""
    [ray] = pods(docs)[pod]["spec"]["containers"]
    return ray


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """All containers within an object."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for one in value.values():
            yield from containers(one)
    elif isinstance(value, list):
        for one in value:
            yield from containers(one)


def seconds(command: list[str]) -> int:
    return int(next(word for word in command if word.startswith("--seconds=")).removeprefix("--seconds="))


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi"), quantity
    return int(quantity.removesuffix("Gi"))


def wrong(docs: Docs, setup: Docs) -> Iterator[str]:
    """What these files must not be, beyond their schema: rule by rule."""
    yield from wrong_cluster(docs)
    for name, pod in pods(docs).items():
        for problem in wrong_pod(name, pod, {(doc["kind"], doc["metadata"]["name"]) for doc in [*setup, *docs]}):
            yield f"{name}: {problem}"
    yield from wrong_around(docs)


def wrong_cluster(docs: Docs) -> Iterator[str]:
    cluster = ray_cluster(docs)
    head = cluster["headGroupSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token is asked for"
    if f"ray=={cluster['rayVersion']} " not in (ROOT / "requirements" / "gpu.txt").read_text():
        yield "rayVersion is not the lock's"
    options = cluster.get("autoscalerOptions", {})
    if not (cluster.get("enableInTreeAutoscaling") and options.get("version") == "v2"):
        yield "the autoscaler is off, or not v2"
    if not 60 <= options.get("idleTimeoutSeconds", 0) <= 1800:
        yield "idle nodes stay too long, or go between two steps of a run"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work"
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "the head can be reached from outside"
    for group in cluster["workerGroupSpecs"]:
        if group["minReplicas"] > (1 if one_kind(docs) == "RayService" else 0):
            yield f"{group['groupName']}: nodes are paid for while nothing runs"
        if not group["maxReplicas"] <= 16:
            yield f"{group['groupName']}: no bound that a person would want"
    if one_kind(docs) == "RayJob":
        job = the(docs, "RayJob")["spec"]
        if job.get("backoffLimit", 0) < 1 or job.get("submissionMode") != "SidecarMode":
            yield "a run whose head dies is not tried again"
        if not (
            job.get("shutdownAfterJobFinishes")
            and job.get("activeDeadlineSeconds")
            and job.get("ttlSecondsAfterFinished")
        ):
            yield "the cluster outlives its run"
        if job.get("entrypointNumGpus") or job.get("entrypointNumCpus"):
            yield "the entry point takes what runs need"
    if len(name := next(doc for doc in docs if doc["kind"] == one_kind(docs))["metadata"]["name"]) > LONGEST_NAME:
        yield f"KubeRay refuses the name {name}"


def one_kind(docs: Docs) -> str:
    return next(doc["kind"] for doc in docs if doc["kind"].startswith("Ray"))


def wrong_pod(name: str, pod: dict[str, Any], there: set[tuple[str, str]]) -> Iterator[str]:
    spec = pod["spec"]
    [ray] = spec["containers"]
    resources = ray["resources"]
    if resources["requests"] != resources["limits"]:
        yield "requests are not limits"
    gpus = int(resources["limits"].get(GPU, 0))
    if name == "head" and gpus:
        yield "a GPU on the head"
    if bool(gpus) != any(one.get("key") == GPU for one in spec.get("tolerations", [])):
        yield "GPU nodes are for pods with GPUs, and for all of these"
    if any("key" not in one for one in spec.get("tolerations", [])):
        yield "tolerates every taint"
    _, _, tag = ray["image"].rpartition("/")[2].partition(":")
    if not tag or tag in ("latest", "nightly"):
        yield "the image has no version"
    for variable in ray.get("env", []):
        if SECRET_NAME.search(variable["name"]):
            yield f"a secret in the environment: {variable['name']}"
    if ray.get("envFrom"):
        yield "a whole secret or ConfigMap in the environment"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount for mount in ray["volumeMounts"]}
    for volume in volumes.values():
        if not {"emptyDir", "secret", "configMap"} & set(volume):
            yield f"volume {volume['name']} is none of those that are needed"
        if "secret" in volume and (
            volume["secret"].get("defaultMode", 0o644) & 0o227 or not mounts[volume["name"]]["readOnly"]
        ):
            yield f"secret {volume['name']} can be read by all, or written"
        if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in there:
            yield f"there is no ConfigMap {volume['configMap']['name']}"
    memory = volumes["shared-mem"]["emptyDir"]
    if mounts["shared-mem"]["mountPath"] != "/dev/shm" or memory.get("medium") != "Memory":
        yield "/dev/shm is the container's own 64 MiB"
    elif not gibibytes(memory["sizeLimit"]) <= gibibytes(resources["limits"]["memory"]) / 2:
        yield "/dev/shm takes more than half of the memory"
    command = ray["lifecycle"]["preStop"]["exec"]["command"]
    wait = int(next(one["value"] for one in ray["env"] if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S"))
    if not spec["terminationGracePeriodSeconds"] > seconds(command) >= wait >= 300:
        yield "ended before a checkpoint is written"
    if command[2] != ("head" if name == "head" else "worker"):
        yield "leaves as what it is not"
    own = ray["securityContext"]
    if not (spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000):
        yield "runs as root"
    if own["allowPrivilegeEscalation"] or own["capabilities"] != {"drop": ["ALL"]} or own.get("privileged"):
        yield "has rights that nothing needs"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    if spec["automountServiceAccountToken"] != (name == "head"):
        yield "a key to Kubernetes where none is needed, or none where the autoscaler needs it"
    for kind, named in (("ServiceAccount", spec["serviceAccountName"]), ("PriorityClass", spec["priorityClassName"])):
        if (kind, named) not in there:
            yield f"there is no {kind} {named}"


def wrong_around(docs: Docs) -> Iterator[str]:
    instance = pods(docs)["head"]["metadata"]["labels"]["ray-ft/instance"]
    own = {"matchLabels": {"ray-ft/instance": instance}}
    if any(pod["metadata"]["labels"]["ray-ft/instance"] != instance for pod in pods(docs).values()):
        yield "pods of one cluster do not know each other"
    policies = [doc["spec"] for doc in docs if doc["kind"] == "NetworkPolicy"]
    rules = [rule for policy in policies for rule in policy["ingress"]]
    if any(policy["podSelector"] != own for policy in policies):
        yield "a policy for others' pods"
    if {"from": [{"podSelector": own}]} not in rules:
        yield "Ray's own pods cannot reach each other"
    for rule in rules:
        if not rule.get("from") or {} in rule["from"] or {"namespaceSelector": {}} in rule["from"]:
            yield "anybody may come in"
        elif rule["from"] != [{"podSelector": own}] and not rule.get("ports"):
            yield "others reach every port"
    budget = the(docs, "PodDisruptionBudget")["spec"]
    if (
        budget["selector"] != {"matchLabels": own["matchLabels"] | {"ray.io/node-type": "head"}}
        or budget["minAvailable"] != 1
    ):
        yield "the head may be evicted"
