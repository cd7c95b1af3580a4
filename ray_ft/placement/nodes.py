"""The kinds of nodes that the connected cluster has, and those that its autoscaler may add.

An autoscaler's limits are read where they are: in the configuration file on the head node (`ray up`, `ray start
--autoscaling-config`), in KubeRay's RayCluster, or in Ray's own table, which its open autoscaler leaves empty. Limits:
what other work on the cluster holds is not taken off.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_ft import session
from ray_ft.errors import first_line

#: Nodes of a kind without a limit of its own: more than any cluster has.
UNLIMITED = 1 << 20
LABEL = "ray.io/node-group"
NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

#: Names of node types, their resources, and how many nodes there may be.
Types = dict[str, tuple[dict[str, float], int]]


@dataclass(frozen=True)
class Nodes:
    """So many nodes of this kind, at most: those that are there, and those that the autoscaler may add.

    Attributes:
        resources: of each node, by Ray's names: CPU, GPU.
        together: at most so many nodes of all kinds that say so, as the autoscaler limits their sum; None: no limit.
        spare_cpus: of each node's CPUs, those that the machine has not: for tasks that read data, not for workers.
    """

    resources: Mapping[str, float]
    count: int
    name: str = ""
    together: int | None = None
    spare_cpus: float = 0.0

    def __str__(self) -> str:
        has = ", ".join(f"{self.resources[key]:g} {key}s" for key in ("CPU", "GPU") if self.resources.get(key))
        return (f"{self.name!r} with " if self.name else "") + (has or "no CPUs and no GPUs")


def is_connected() -> bool:
    """Whether this process is connected to Ray already, whoever did it; does not load Ray."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def cluster(say: Callable[[str], None] = lambda line: None) -> list[Nodes]:
    """The nodes of the connected cluster, and those that it may come to have.

    Args:
        say: takes a line where the limits of an autoscaler could not be read; then only what is there counts.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    types, together = _may_have(alive, say)
    there: Counter[str] = Counter()
    found = []
    for node in alive:
        name = node["Labels"].get(LABEL, "") or _alike(node, types)
        if name in types and not _is_head(node):  # counted below, with those that are still to come
            there[name] += 1
        else:
            spare = session.SPARE_CPUS if _is_own(alive) else 0
            found.append(Nodes(_of_interest(node["Resources"]), 1, name, spare_cpus=spare))
    for name, (resources, most) in types.items():
        if count := max(most, there[name]):
            found.append(Nodes(resources, count, name, together))
    return found


def _is_own(alive: list[dict[str, Any]]) -> bool:
    """Whether Ray runs here only for this command: then it counts CPUs beside the machine's own (see `session`).

    Workers know no RAY_ADDRESS, whichever Ray they are of; but that one listens on loopback, and has one node.
    """
    addresses = [node.get("NodeManagerAddress", "") for node in alive]
    return not session.address() and len(addresses) == 1 and addresses[0].startswith("127.")


def _may_have(alive: list[dict[str, Any]], say: Callable[[str], None]) -> tuple[Types, int | None]:
    """The node types of the autoscaler, and how many nodes it may keep in all, without the head."""
    import ray._private.state

    if table := ray._private.state.state.get_cluster_config():
        types = {
            group.name: (_of_interest(group.resources), group.max_count if group.max_count >= 0 else UNLIMITED)
            for group in table.node_group_configs
            if group.resources
        }
        return types, None
    config, why = _config(alive)
    if why:
        say(f"the autoscaler's limits cannot be read ({why}); only the nodes that are there count")
    if not config:
        return {}, None
    known = config.get("available_node_types", {})
    # A type without resources is never started for what is asked for: the autoscaler cannot know that it would fit.
    types = {
        name: (_of_interest(one["resources"]), int(one.get("max_workers", config.get("max_workers", 0))))
        for name, one in known.items()
        if one.get("resources")
    }
    return types, config.get("max_workers")


def _alike(node: dict[str, Any], types: Types) -> str:
    """The type of a node that does not name its own, as Ray's older autoscaler starts them; or nothing."""
    has = _of_interest(node["Resources"])
    return next((name for name, (resources, most) in types.items() if most and resources == has), "")


def _of_interest(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: float(resources[name]) for name in ("CPU", "GPU") if resources.get(name, 0) > 0}


def _is_head(node: dict[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _config(alive: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The autoscaler's configuration, or None where there is none; and why it could not be read, or nothing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    head = next(node["NodeID"] for node in alive if _is_head(node))
    session_name = context.get_session_name()
    if head == context.get_node_id():
        return on_head(session_name)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    return ray.get(ray.remote(num_cpus=0)(on_head).options(scheduling_strategy=there).remote(session_name))


def on_head(session_name: str) -> tuple[dict[str, Any] | None, str]:
    """What `_config` says, asked on the head node of the cluster whose session has this name."""
    import psutil

    # The file is named on the command line of the process that reads it, and nowhere else: ray up's own place for it is
    # also there long after a cluster was started in another way. One machine may have the heads of several clusters.
    for process in psutil.process_iter(["cmdline"]):
        arguments = dict(one.split("=", 1) for one in process.info["cmdline"] or () if "=" in one)
        of_this = session_name in arguments.get("--logs-dir", "").split("/")
        if of_this and (file := arguments.get("--autoscaling-config")):
            try:
                return yaml.safe_load(Path(file).expanduser().read_text()), ""
            except (OSError, yaml.YAMLError) as error:
                return None, first_line(error)
    if name := os.environ.get("RAY_CLUSTER_NAME"):  # set by KubeRay
        try:
            return _kuberay(name), ""
        except Exception as error:  # there may be no autoscaler, and then there is no right to ask either
            return None, f"RayCluster {name}: {first_line(error)}"
    return None, ""


def _kuberay(name: str) -> dict[str, Any]:
    """What KubeRay's autoscaler would read, by its own means."""
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    client = node_provider.KubernetesHttpApiClient(Path(NAMESPACE).read_text().strip())
    found = client.get(f"rayclusters/{name}")
    if not found["spec"].get("enableInTreeAutoscaling"):
        return {}
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(found)
