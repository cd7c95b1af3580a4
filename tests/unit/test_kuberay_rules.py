"""The rules that the files of cluster/kuberay keep, and for each rule a planted fault that it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.kuberay_rules import (
    GPU,
    OVERLAYS,
    Docs,
    container,
    containers,
    needs_kubectl,
    pods,
    ray_cluster,
    rendered,
    the,
    wrong,
)

pytestmark = needs_kubectl


@pytest.mark.parametrize("name", OVERLAYS)
def test_rendered_files_keep_our_rules(name: str) -> None:
    assert list(wrong(rendered(name), rendered("setup"))) == []


def volume(docs: Docs, name: str, pod: str = "gpu") -> dict[str, Any]:
    return next(one for one in pods(docs)[pod]["spec"]["volumes"] if one["name"] == name)


def tolerate(docs: Docs, pod: str, **toleration: str) -> None:
    pods(docs)[pod]["spec"].setdefault("tolerations", []).append(toleration)


RULE_FAULTS: dict[str, tuple[Callable[[Docs], Any], str]] = {
    "no authentication": (lambda d: ray_cluster(d).pop("authOptions"), "no token is asked for"),
    "another Ray": (lambda d: ray_cluster(d).update(rayVersion="2.59.0"), "rayVersion is not the lock's"),
    "no autoscaler": (lambda d: ray_cluster(d).pop("enableInTreeAutoscaling"), "the autoscaler is off, or not v2"),
    "no idle timeout": (
        lambda d: ray_cluster(d)["autoscalerOptions"].pop("idleTimeoutSeconds"),
        "idle nodes stay too long",
    ),
    "a head that works": (lambda d: ray_cluster(d)["headGroupSpec"]["rayStartParams"].clear(), "the head takes work"),
    "a public head": (lambda d: ray_cluster(d)["headGroupSpec"].update(serviceType="LoadBalancer"), "from outside"),
    "nodes that stay": (
        lambda d: ray_cluster(d)["workerGroupSpecs"][1].update(minReplicas=1),
        "gpu: nodes are paid for",
    ),
    "no maximum": (lambda d: ray_cluster(d)["workerGroupSpecs"][0].update(maxReplicas=2**31 - 1), "cpu: no bound"),
    "no second attempt": (lambda d: the(d, "RayJob")["spec"].pop("backoffLimit"), "not tried again"),
    "a submitter elsewhere": (lambda d: the(d, "RayJob")["spec"].pop("submissionMode"), "not tried again"),
    "a cluster that stays": (lambda d: the(d, "RayJob")["spec"].pop("shutdownAfterJobFinishes"), "outlives its run"),
    "a driver with a GPU": (lambda d: the(d, "RayJob")["spec"].update(entrypointNumGpus=1), "takes what runs need"),
    "a long name": (lambda d: the(d, "RayJob")["metadata"].update(name="a" * 48), "KubeRay refuses the name"),
    "burstable": (lambda d: container(d)["resources"]["requests"].update(cpu="1"), "gpu: requests are not limits"),
    "a GPU on the head": (
        lambda d: [
            pods(d)["head"]["spec"]["containers"][0]["resources"][key].update({GPU: "1"})
            for key in ("requests", "limits")
        ],
        "head: ",
    ),
    "CPU pods on GPU nodes": (lambda d: tolerate(d, "cpu", key=GPU, operator="Exists"), "cpu: GPU nodes are for"),
    "GPU pods nowhere": (lambda d: pods(d)["gpu"]["spec"].pop("tolerations"), "gpu: GPU nodes are for"),
    "every taint": (
        lambda d: tolerate(d, "gpu", operator="Exists"),
        "gpu: tolerates every taint",
    ),
    "latest": (lambda d: container(d).update(image="host:5000/ray-ft:latest"), "gpu: the image has no version"),
    "no tag": (lambda d: container(d).update(image="host:5000/ray-ft"), "gpu: the image has no version"),
    "a token in the environment": (
        lambda d: container(d)["env"].append({"name": "HF_TOKEN", "value": "a"}),
        "HF_TOKEN",
    ),
    "a secret in the environment": (
        lambda d: container(d).update(envFrom=[{"secretRef": {"name": "ray-ft-secrets"}}]),
        "a whole secret",
    ),
    "a host's folder": (
        lambda d: pods(d)["cpu"]["spec"]["volumes"].append({"name": "a", "hostPath": {"path": "/"}}),
        "volume a",
    ),
    "secrets for all": (lambda d: volume(d, "secrets")["secret"].pop("defaultMode"), "gpu: secret secrets can be read"),
    "no recipe": (lambda d: d.remove(the(d, "ConfigMap")), "there is no ConfigMap train-recipe"),
    "a small /dev/shm": (lambda d: volume(d, "shared-mem")["emptyDir"].pop("medium"), "the container's own 64 MiB"),
    "a large /dev/shm": (lambda d: volume(d, "shared-mem")["emptyDir"].update(sizeLimit="1000Gi"), "more than half"),
    "a quick end": (lambda d: pods(d)["gpu"]["spec"].update(terminationGracePeriodSeconds=30), "before a checkpoint"),
    "root": (lambda d: pods(d)["gpu"]["spec"]["securityContext"].update(runAsUser=0), "gpu: runs as root"),
    "a capability": (
        lambda d: container(d)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        "gpu: has rights",
    ),
    "the host's network": (lambda d: pods(d)["gpu"]["spec"].update(hostNetwork=True), "gpu: shares the host's"),
    "Kubernetes' key on workers": (
        lambda d: pods(d)["cpu"]["spec"].update(automountServiceAccountToken=True),
        "cpu: a key",
    ),
    "no such account": (
        lambda d: pods(d)["cpu"]["spec"].update(serviceAccountName="me"),
        "cpu: there is no ServiceAccount me",
    ),
    "no such priority": (
        lambda d: pods(d)["cpu"]["spec"].update(priorityClassName="high"),
        "there is no PriorityClass high",
    ),
    "strangers": (
        lambda d: pods(d)["cpu"]["metadata"]["labels"].update({"ray-ft/instance": "b"}),
        "do not know each other",
    ),
    "an open port": (lambda d: the(d, "NetworkPolicy")["spec"]["ingress"].append({"ports": []}), "anybody may come in"),
    "all ports for others": (
        lambda d: the(d, "NetworkPolicy")["spec"]["ingress"][1].pop("ports"),
        "others reach every port",
    ),
    "workers cut off": (lambda d: the(d, "NetworkPolicy")["spec"]["ingress"].pop(0), "cannot reach each other"),
    "a policy for all": (lambda d: the(d, "NetworkPolicy")["spec"].update(podSelector={}), "a policy for others' pods"),
    "a head that is moved": (
        lambda d: the(d, "PodDisruptionBudget")["spec"].update(minAvailable=0),
        "the head may be evicted",
    ),
}


@pytest.mark.parametrize("fault", RULE_FAULTS)
def test_our_rules_find(fault: str) -> None:
    docs = rendered("train")
    plant, said = RULE_FAULTS[fault]
    plant(docs)
    found = list(wrong(docs, rendered("setup")))
    assert found and all(said in problem for problem in found), found


def test_nobody_reaches_a_pod_that_no_policy_names() -> None:
    assert the(rendered("setup"), "NetworkPolicy")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name in ("setup", *OVERLAYS):
        assert {doc["metadata"].get("namespace", "ray-ft") for doc in rendered(name)} == {"ray-ft"}


def test_all_pods_of_a_kind_are_one_template() -> None:
    """What the three have in common is said once: their pods differ by what each adds, and by nothing else."""

    def common(name: str) -> dict[str, Any]:
        made = pods(rendered(name))
        for pod in made.values():
            [ray] = pod["spec"]["containers"]
            del pod["metadata"]["labels"]["ray-ft/instance"]
            pod["spec"]["priorityClassName"] = ""
            ray.pop("startupProbe", None)
            for rows in (pod["spec"]["volumes"], ray["volumeMounts"]):
                rows[:] = [row for row in rows if row["name"] not in ("api-keys", "recipe")]
        return made

    assert common("cluster") == common("train") == common("serve")
    images = {ray["image"] for name in ("setup", *OVERLAYS) for doc in rendered(name) for ray in containers(doc)}
    assert len(images) == 1


def test_spot_pods_are_gpu_pods_on_other_nodes() -> None:
    found = pods(rendered("train"))
    spot = found["gpu-spot"]["spec"]
    assert spot.pop("nodeSelector") == {"ray-ft/capacity": "spot"}
    assert spot["tolerations"].pop() == {"key": "ray-ft/capacity", "value": "spot", "effect": "NoSchedule"}
    assert found["gpu-spot"] == found["gpu"]
