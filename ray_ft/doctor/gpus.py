"""The GPUs of each node: as many as Ray counts, alike, healthy, free, cool, joined as they should, usable by torch.

`look` runs on a node and asks nvidia-smi (`smi`), so it makes no CUDA context and takes no memory; `check` compares.
Limits: NVIDIA only. Memory that another job of this cluster holds looks like a stranger's.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import multimode
from typing import Any
from xml.etree.ElementTree import ParseError

from ray_ft.doctor import smi
from ray_ft.doctor.finding import Finding, Severity, names

GIB = 1 << 30
GROUP = "ray.io/node-group"  # the label by which autoscalers name a node's type
#: Bytes that a GPU nobody uses may hold: the driver's own, and a display's.
OWN_BYTES = GIB
MARGIN = 5.0  # degrees Celsius: nearer to its limit than this, a card will slow down under load
SHARE = 0.95  # of the usual power limit: below it a cap costs speed
PEERLESS = {
    "CNS": "the chipset cannot",
    "GNS": "the GPU cannot",
    "TNS": "the topology does not allow it",
    "NS": "not supported",
    "DR": "disabled in the driver's settings",
    "U": "unknown",
}


def look() -> dict[str, Any]:
    """The facts of this node.

    Returns:
        declared: GPUs that Ray counts here, None where it is not connected; group: the node's type, or "".
        failed: why nvidia-smi says nothing, or ""; installed: whether it is there.
        driver, cuda: versions of the driver, and of the newest CUDA that it runs.
        torch_cuda: that torch was built for; "": torch is a CPU build; None: there is no torch.
        gpus: see `smi.states`. links, peers: see `smi.matrix`, of `topo -m` and `topo -p2p r`.
    """
    declared, group = _as_ray_says()
    facts: dict[str, Any] = {"declared": declared, "group": group, "torch_cuda": _torch_cuda(), "failed": ""}
    facts |= {"installed": True, "driver": "", "cuda": "", "gpus": [], "links": [], "peers": []}
    try:
        versions, gpus = smi.states(smi.run("-q", "-x"))
        facts |= versions | {"gpus": gpus}
        if len(gpus) > 1:
            facts |= {"links": smi.matrix(smi.run("topo", "-m")), "peers": smi.matrix(smi.run("topo", "-p2p", "r"))}
    except smi.Unanswered as error:
        facts |= {"failed": str(error), "installed": error.there}
    except ParseError as error:
        facts["failed"] = f"nvidia-smi's answer cannot be read: {error}"
    return facts


def _as_ray_says() -> tuple[int | None, str]:
    import ray

    if not ray.is_initialized():
        return None, ""
    identity = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == identity)
    return int(node["Resources"].get("GPU", 0)), node.get("Labels", {}).get(GROUP, "")


def _torch_cuda() -> str | None:
    """Out of torch's file of versions: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    text = Path(found.submodule_search_locations[0], "version.py").read_text()
    said = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return said[1] if said else ""


# ------------------------------------------------------------------------------------------------------------- checks


def check(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What follows from the facts of all nodes.

    Args:
        nodes: what `look` said, by the name that findings call the node; those without GPUs are passed over.

    Returns:
        Findings named gpus.count, .state, .errors, .memory, .heat, .power, .pcie, .mig, .links, .peers, .alike,
        .driver, .torch; one gpus.healthy for all nodes where there is nothing to say.
    """
    findings: list[Finding] = []
    having = {}
    for node, facts in nodes.items():
        findings += _count(node, facts)
        if facts["gpus"]:
            having[node] = facts
            findings += _software(node, facts)
            for gpu in facts["gpus"]:
                findings += _health(node, gpu)
            findings += _between(node, facts)
    groups: defaultdict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for node, facts in having.items():
        groups[facts["group"]][node] = facts
    for group in groups.values():
        findings += _alike(group)
    if having and not any(finding.severity >= Severity.WARNING for finding in findings):
        kinds = Counter(gpu["name"] for facts in having.values() for gpu in facts["gpus"])
        said = ", ".join(f"{count} × {name}" for name, count in sorted(kinds.items()))
        findings.append(Finding("gpus.healthy", Severity.OK, names(having), said))
    elif not having and not findings:
        findings.append(Finding("gpus.count", Severity.NOTE, names(nodes), "no GPUs; training runs on CPUs"))
    return findings


def _count(node: str, facts: Mapping[str, Any]) -> list[Finding]:
    declared, there = facts["declared"], len(facts["gpus"])
    if facts["failed"] and (declared or facts["installed"]):
        # Without a working driver Ray counts none: that may be a node whose driver broke, or an image without GPUs.
        severity = Severity.ERROR if declared and facts["installed"] else Severity.WARNING
        what = f"Ray counts {declared or 0} GPUs, and they cannot be looked at: {facts['failed']}"
        ways = (
            "run nvidia-smi there: a GPU that fell off the bus needs a reboot, a driver that was updated too",
            "in a container: start it with the NVIDIA runtime and the capability 'utility'",
        )
        return [Finding("gpus.state", severity, node, what, ways)]
    if declared is None or declared == there:
        return []
    if declared > there:
        what = f"Ray counts {declared} GPUs and {there} are there: workers would be given GPUs that do not exist"
        ways = (
            "start Ray without --num-gpus, or the right one",
            "if a GPU is lost (dmesg | grep Xid): reboot the node",
        )
        return [Finding("gpus.count", Severity.ERROR, node, what, ways)]
    return [Finding("gpus.count", Severity.NOTE, node, f"Ray counts {declared} of the {there} GPUs that are there")]


def _software(node: str, facts: Mapping[str, Any]) -> list[Finding]:
    """Whether torch and the driver fit: a driver runs programs of its own major CUDA version and of older ones.

    Source: CUDA's documentation of compatibility, "minor version compatibility".
    """
    torch_cuda, cuda = facts["torch_cuda"], facts["cuda"]
    if torch_cuda == "" and facts["declared"]:
        what, way = (
            "torch there is a CPU build and cannot use the GPUs",
            "install requirements/gpu.txt there, not cpu.txt",
        )
        return [Finding("gpus.torch", Severity.ERROR, node, what, (f"{way}: cluster/setup.sh gpu",))]
    if not torch_cuda or not cuda:
        return []
    wanted, have = _version(torch_cuda), _version(cuda)
    said = f"torch is built for CUDA {torch_cuda}, and driver {facts['driver']} runs CUDA up to {cuda}"
    if wanted[0] > have[0]:
        ways = (f"install a driver for CUDA {wanted[0]}", "or a torch that is built for an older CUDA, on every node")
        return [Finding("gpus.torch", Severity.ERROR, node, said, ways)]
    if wanted > have:
        return [Finding("gpus.torch", Severity.NOTE, node, f"{said}: within one major version that works")]
    return []


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _health(node: str, gpu: Mapping[str, Any]) -> list[Finding]:
    findings = []
    where = f"{node} GPU {gpu['index']}"

    def found(name: str, severity: Severity, what: str, *ways: str) -> None:
        findings.append(Finding(name, severity, where, what, ways))

    if gpu["recovery"]:
        action = gpu["recovery"].lower()
        found("gpus.state", Severity.ERROR, f"the driver asks for: {action}", f"do so ({action}) before a run")
    if gpu["fabric"] not in ("", "Completed"):
        found(
            "gpus.state",
            Severity.ERROR,
            f"it is not registered with the NVLink switches ({gpu['fabric']}), so CUDA does not start",
            "systemctl start nvidia-fabricmanager, of the driver's exact version",
        )
    if gpu["uncorrected"]:
        found(
            "gpus.errors",
            Severity.ERROR,
            f"{gpu['uncorrected']} uncorrectable memory errors since the driver was loaded: results may be wrong",
            "reset the GPU (nvidia-smi --gpu-reset) or reboot, and have it replaced if they come back",
        )
    if gpu["remap_failed"]:
        ways = ("take the node out and have the card replaced",)
        found("gpus.errors", Severity.ERROR, "bad memory could not be replaced by spare memory", *ways)
    elif gpu["remap_pending"]:
        ways = ("reset the GPU (nvidia-smi --gpu-reset) or reboot before a long run",)
        found("gpus.errors", Severity.WARNING, "bad memory was found and is replaced at the next reset", *ways)
    if gpu["ecc"] is False:
        found("gpus.errors", Severity.NOTE, "ECC is off: memory errors go unnoticed")
    if gpu["used"] is not None and gpu["used"] > OWN_BYTES:
        found("gpus.memory", Severity.WARNING, _used(gpu), *_whose(gpu))
    findings += _speed(where, gpu)
    return findings


def _used(gpu: Mapping[str, Any]) -> str:
    size = f" of {gpu['total'] / GIB:.1f}" if gpu["total"] else ""
    holders = [f"{one['name'] or 'process'} ({one['pid']})" for one in gpu["processes"]]
    whose = ", ".join(holders[:3]) or "by processes that cannot be seen from here"
    return f"{gpu['used'] / GIB:.1f}{size} GiB are in use: {whose}"


def _whose(gpu: Mapping[str, Any]) -> tuple[str, ...]:
    pids = " ".join(str(one["pid"]) for one in gpu["processes"][:3])
    known = f"end what is left of an earlier run: kill {pids}" if pids else "see on the host itself whose it is"
    return known, "if it is this cluster's (ray list actors): wait for it, or ask for GPUs beside it"


def _speed(where: str, gpu: Mapping[str, Any]) -> list[Finding]:
    """What makes one GPU slower than its like, for which all others wait."""
    findings = []

    def slow(name: str, what: str, *ways: str) -> None:
        findings.append(Finding(name, Severity.WARNING, where, what, ways))

    degrees = "" if gpu["celsius"] is None else f" ({gpu['celsius']:g} °C)"
    # hw_slowdown sums the two others of the hardware up; it is said where it is alone.
    told = [name for name in gpu["slowed"] if name != "hw_slowdown" or len(gpu["slowed"]) == 1]
    if told:
        why = " and ".join(smi.SLOWED[name] for name in told)
        power = "power" if told == ["hw_power_brake_slowdown"] else "cooling"
        slow("gpus.heat", f"its clocks are held down: {why}{degrees}", f"look at the node's {power}, or leave it out")
    elif gpu["margin"] is not None and gpu["margin"] <= MARGIN:
        what = f"it is {gpu['margin']:g} degrees from slowing down{degrees}"
        slow("gpus.heat", what, "look at the node's cooling, or leave it out")
    if gpu["watts"] and gpu["usual_watts"] and gpu["watts"] < SHARE * gpu["usual_watts"]:
        what = f"its power is limited to {gpu['watts']:g} W of the usual {gpu['usual_watts']:g}"
        slow("gpus.power", what, f"nvidia-smi -i {gpu['index']} -pl {gpu['usual_watts']:g}, unless the limit is meant")
    if gpu["width"] and gpu["usual_width"] and gpu["width"] < gpu["usual_width"]:
        what = f"it has {gpu['width']:g} of its {gpu['usual_width']:g} PCIe lanes"
        slow("gpus.pcie", what, "reseat the card or its riser; in a cloud: give the machine back and take another")
    if gpu["mig"]:
        what = "it is divided by MIG: a worker sees one part, and NCCL does not join parts"
        slow("gpus.mig", what, f"nvidia-smi -i {gpu['index']} -mig 0 to train on the whole GPU")
    return findings


def _between(node: str, facts: Mapping[str, Any]) -> list[Finding]:
    """Whether GPUs of one node reach one another's memory."""
    links, peers = facts["links"], facts["peers"]
    without: defaultdict[str, list[str]] = defaultdict(list)
    broken = []
    for one, row in enumerate(peers):
        for other, state in enumerate(row):
            if other <= one or state in ("OK", "X"):
                continue
            without[state].append(f"{one}-{other}")
            if links and links[one][other].startswith("NV"):
                broken.append(f"{one}-{other}")
    if broken:
        what = f"GPUs {', '.join(broken[:4])} are joined by NVLink and cannot use one another's memory"
        ways = ("nvidia-smi topo -p2p r says why; look at the driver's settings and the fabric manager",)
        return [Finding("gpus.peers", Severity.WARNING, node, what, ways)]
    if without:
        said = "; ".join(f"{', '.join(pairs[:4])}: {PEERLESS.get(why, why)}" for why, pairs in without.items())
        what = f"GPUs without peer access, which copy by way of the host's memory: {said}"
        return [Finding("gpus.peers", Severity.NOTE, node, what)]
    return []


def _alike(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Nodes of one group: the slowest or smallest GPU sets the pace of all."""
    ways = ("use one machine type for all workers, or give each its own node group",)
    findings = []
    kinds = {node: _kinds(facts["gpus"]) for node, facts in nodes.items()}
    for node, kind in kinds.items():
        if len(set(kind)) > 1:
            what = f"its GPUs differ: {_in_words(kind)}"
            findings.append(Finding("gpus.alike", Severity.WARNING, node, what, ways))
    findings += _odd("gpus.alike", {node: _in_words(kind) for node, kind in kinds.items()}, "GPUs", ways)
    same = ("install one version of the driver on all nodes: one machine image",)
    findings += _odd("gpus.driver", {node: facts["driver"] for node, facts in nodes.items()}, "driver", same)
    joined = {node: _joined(facts["links"]) for node, facts in nodes.items() if facts["links"]}
    look_at = ("nvidia-smi nvlink --status there: a link may be down", "reset the GPUs or reboot the node")
    findings += _odd("gpus.links", joined, "links between GPUs", look_at)
    return findings


def _kinds(gpus: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Name and GiB of each GPU: drivers keep slightly more or less for themselves, so bytes would differ."""
    return [(gpu["name"], round((gpu["total"] or 0) / GIB)) for gpu in gpus]


def _in_words(kinds: list[tuple[str, int]]) -> str:
    return ", ".join(f"{count} × {name} {size} GiB" for (name, size), count in sorted(Counter(kinds).items()))


def _joined(links: list[list[str]]) -> str:
    kinds = Counter(kind for one, row in enumerate(links) for kind in row[one + 1 :])
    return ", ".join(f"{count} pairs by {kind}" for kind, count in sorted(kinds.items()))


def _odd(name: str, said: Mapping[str, str], what: str, ways: tuple[str, ...]) -> list[Finding]:
    """A warning about the nodes that say something else than most."""
    if len(set(said.values())) < 2:
        return []
    usual = max(multimode(said.values()))
    different: defaultdict[str, list[str]] = defaultdict(list)
    for node, text in said.items():
        if text != usual:
            different[text].append(node)
    return [
        Finding(name, Severity.WARNING, names(where), f"{what}: {text}; elsewhere {usual}", ways)
        for text, where in different.items()
    ]
