"""Whether nodes find and reach one another, and over which interface they will talk: names, addresses, MTU, Ethernet.

Training processes find one another by the address that Ray has for each node, and talk over the interface that has it
(`ray_ft.hosts.choose_interface`); host names are for other programs, so a name that leads elsewhere is a warning, not
an error. Limits: reached means that the port of Ray's raylet took a connection; other ports, and how fast the network
is, are `fabric`'s to measure.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import multimode
from typing import Any, TypeVar

from ray_ft import hosts
from ray_ft.doctor import rdma
from ray_ft.doctor.finding import Finding, Severity, names
from ray_ft.errors import first_line

SECONDS = 3.0  # for all names, and for all connections, of one node
MOST_PEERS = 32  # that one node tries; on larger clusters each tries those that follow it, so that every one is tried
FASTER = 4  # times: a second interface that much faster than the one in use is worth saying
FAST_ENOUGH = 25_000  # Mb/s: beyond it TCP is limited by the processor

Key = TypeVar("Key")
Result = TypeVar("Result")


def look() -> dict[str, Any]:
    """The facts of this node; of this process alone where Ray is not connected.

    Returns:
        id, address, host_name: of this node, the first two as Ray has them.
        gpus: that Ray counts here.
        interfaces: name → {addresses, mtu, up, mbps (0: unknown), virtual}.
        chosen: the interface that has the address; "" if none has.
        environment: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where they are set.
        own: the addresses that this host's own name leads to; or "!" and why it leads nowhere.
        peers: by address: {name, leads_to (as `own`), refused ("" if its raylet took a connection, else why)}.
        rdma: see `rdma.look`.
    """
    import ray

    address, identity, nodes = "127.0.0.1", "", []
    if ray.is_initialized():
        identity = ray.get_runtime_context().get_node_id()
        nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    here = next((place for place, node in enumerate(nodes) if node["NodeID"] == identity), 0)
    if nodes:
        address = nodes[here]["NodeManagerAddress"]
    others = (nodes[here + 1 :] + nodes[:here])[:MOST_PEERS]
    host_name = socket.gethostname()
    known = {name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ}
    host_names = {host_name, *(node["NodeManagerHostname"] for node in others)}
    leads_to: dict[str, list[str] | str] = _each(host_names, _leads_to, "!no answer")
    refused = _each({(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in others}, _refused, "no answer")
    return {
        "id": identity,
        "address": address,
        "host_name": host_name,
        "gpus": int(nodes[here]["Resources"].get("GPU", 0)) if nodes else 0,
        "interfaces": _interfaces(),
        "chosen": hosts.interface_of(address),
        "environment": {name: os.environ[name] for name in sorted(known)},
        "own": leads_to[host_name],
        "peers": {
            node["NodeManagerAddress"]: {
                "name": node["NodeManagerHostname"],
                "leads_to": leads_to[node["NodeManagerHostname"]],
                "refused": refused[node["NodeManagerAddress"], node["NodeManagerPort"]],
            }
            for node in others
        },
        "rdma": rdma.look(),
    }


def _interfaces() -> dict[str, dict[str, Any]]:
    import psutil

    addresses: dict[str, list[str]] = defaultdict(list)
    for name, found in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        addresses[name.partition(":")[0]] += [one.address for one in found if one.family in families]
    return {
        name: {
            "addresses": addresses[name],
            "mtu": stats.mtu,
            "up": stats.isup,
            "mbps": stats.speed,
            # What a virtual one says of its speed means nothing: veth says 10 Gb/s.
            "virtual": "/devices/virtual/" in str(Path("/sys/class/net", name).resolve()),
        }
        for name, stats in psutil.net_if_stats().items()
    }


def _leads_to(name: str) -> list[str] | str:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        return f"!{first_line(error)}"


def _refused(end: tuple[str, int]) -> str:
    try:
        socket.create_connection(end, timeout=SECONDS).close()
    except OSError as error:
        return first_line(error)
    return ""


def _each(items: set[Key], ask: Callable[[Key], Result], late: Result) -> dict[Key, Result]:
    """What `ask` says of each, all at once; `late` for those that take more than `SECONDS`.

    In daemon threads: a name server that keeps silent holds a thread for half a minute, and nobody should wait for it.
    """
    answers: dict[Key, Result] = {}
    threads = []
    for item in items:

        def answer(item: Key = item) -> None:
            answers[item] = ask(item)

        threads.append(threading.Thread(target=answer, daemon=True))
        threads[-1].start()
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    found = dict(answers)
    return {item: found.get(item, late) for item in items}


# ------------------------------------------------------------------------------------------------------------- checks


def check(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What follows from the facts of all nodes.

    Args:
        nodes: what `look` said, by the name that findings call the node.

    Returns:
        Findings named network.reach, .interface, .address, .names, .mtu, .faster; and those of `rdma.check` for nodes
        with GPUs, if there are several.
    """
    findings = [*_addresses(nodes), *_interface(nodes), *_names(nodes), *_mtu(nodes), *_faster(nodes)]
    findings += _reach(nodes)
    with_gpus = {name: facts["rdma"] for name, facts in nodes.items() if facts["gpus"]}
    if len(with_gpus) > 1:
        findings += rdma.check(with_gpus)
    return findings


def _reach(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    tried = sum(len(facts["peers"]) for facts in nodes.values())
    called = {facts["address"]: name for name, facts in nodes.items()}
    findings = []
    for name, facts in nodes.items():
        lost = {called.get(peer, peer): why for peer, one in facts["peers"].items() if (why := one["refused"])}
        if lost:
            findings.append(
                Finding(
                    "network.reach",
                    Severity.ERROR,
                    name,
                    f"cannot connect to {names(lost)}: {next(iter(lost.values()))}",
                    (
                        "let all TCP ports through between the nodes (a security group that allows itself)",
                        "if the node has several addresses: ray start --node-ip-address=ADDRESS, one that others reach",
                    ),
                )
            )
    if tried and not findings:
        findings.append(Finding("network.reach", Severity.OK, names(nodes), "each node reaches the others"))
    return findings


def _addresses(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Each node has an address of its own that others can mean."""
    findings = []
    versions: dict[int, list[str]] = defaultdict(list)
    ways = ("start Ray on it with --node-ip-address=ADDRESS, one of the node's own that the others reach",)
    for name, facts in nodes.items():
        try:
            address = ipaddress.ip_address(facts["address"].partition("%")[0].strip("[]"))
        except ValueError:
            what = f"Ray knows the node as {facts['address']!r}, which is no address"
            findings.append(Finding("network.address", Severity.WARNING, name, what, ways))
            continue
        versions[address.version].append(name)
        if len(nodes) > 1 and (address.is_loopback or address.is_link_local):
            kind = "loopback" if address.is_loopback else "link-local"
            what = f"its address is {address}, {kind}: other nodes cannot reach it there"
            findings.append(Finding("network.address", Severity.ERROR, name, what, ways))
        elif not facts["chosen"]:
            what = f"no interface here has the address {address} that Ray has for the node; there are {_said(facts)}"
            more = ("or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where Ray is started",)
            findings.append(Finding("network.address", Severity.WARNING, name, what, ways + more))
    if len(versions) > 1:
        few = min(versions.values(), key=len)
        what = (
            "their addresses are IPv6 where others' are IPv4" if few is versions[6] else "IPv4 where others' are IPv6"
        )
        findings.append(Finding("network.address", Severity.ERROR, names(few), what, ways))
    return findings


def _said(facts: Mapping[str, Any]) -> str:
    found = [f"{name} {one['addresses'][0]}" for name, one in facts["interfaces"].items() if one["addresses"]]
    return ", ".join(found[:6]) or "none"


def _interface(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Which interface gloo and NCCL take on each node, and why."""
    findings: list[Finding] = []
    taken: dict[str, list[str]] = defaultdict(list)
    for name, facts in nodes.items():
        said = facts["environment"]
        if not said and facts["chosen"]:
            taken[facts["chosen"]].append(name)
        for variable, value in said.items():
            found = _named(variable, value, facts["interfaces"])
            up = [one for one in found if facts["interfaces"][one]["up"] and facts["interfaces"][one]["addresses"]]
            loopback = [one for one in up if all(hosts.is_loopback(a) for a in facts["interfaces"][one]["addresses"])]
            if not up or (len(nodes) > 1 and loopback == up):
                why = (
                    "there is no such interface that is up" if not up else "that is loopback: other nodes are not there"
                )
                findings.append(
                    Finding(
                        "network.interface",
                        Severity.ERROR,
                        name,
                        f"{variable}={value} in Ray's environment, and {why}; there are {_said(facts)}",
                        (
                            f"unset {variable} where Ray is started: ray-ft takes the interface of the node's address",
                            f"or name one that is there on every node: {facts['chosen'] or 'see ip address'}",
                        ),
                    )
                )
            else:
                findings.append(
                    Finding("network.interface", Severity.NOTE, name, f"{variable}={value} takes {', '.join(up)}")
                )
    for interface, found_on in sorted(taken.items()):
        severity = Severity.OK if len(taken) == 1 else Severity.NOTE  # other names on other nodes are worth knowing
        what = f"gloo and NCCL talk over {interface}: it has the address that Ray has for the node"
        findings.append(Finding("network.interface", severity, names(found_on), what))
    return findings


def _named(variable: str, value: str, interfaces: Mapping[str, Any]) -> list[str]:
    if variable.startswith("NCCL"):
        return hosts.nccl_takes(value, list(interfaces))
    return [name for name in value.split(",") if name in interfaces]


def _names(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Host names lead to the node, on itself and on the others. None at all leading anywhere is how Kubernetes is."""
    findings = []
    ways = (
        "put all nodes into DNS, or the same lines into /etc/hosts on each",
        "training itself goes by addresses and goes on; ssh, DeepSpeed's launcher and others go by names",
    )
    lost: dict[tuple[str, str], list[str]] = defaultdict(list)  # (name, why) → on which nodes
    wrong: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    found = 0
    for name, facts in nodes.items():
        if isinstance(facts["own"], str):
            what = f"its own host name, {facts['host_name']}, does not resolve there: {facts['own'][1:]}"
            findings.append(Finding("network.names", Severity.WARNING, name, what, ways))
        elif len(nodes) > 1 and facts["address"] not in facts["own"]:
            loopback = all(hosts.is_loopback(address) for address in facts["own"])
            what = (
                f"its own name, {facts['host_name']}, leads to {', '.join(facts['own'])} there, not {facts['address']}"
            )
            # Debian writes 127.0.1.1 for each machine's own name, and we do not go by the name.
            severity = Severity.NOTE if loopback else Severity.WARNING
            findings.append(Finding("network.names", severity, name, what, ways))
        for address, peer in facts["peers"].items():
            if isinstance(peer["leads_to"], str):
                lost[peer["name"], peer["leads_to"][1:]].append(name)
            elif address not in peer["leads_to"] and not _same(peer["name"], facts, address, nodes):
                wrong[peer["name"], address, ", ".join(peer["leads_to"])].append(name)
            else:
                found += 1
    for (name, address, leads_to), where in wrong.items():
        what = f"the name {name} leads to {leads_to}; Ray has {address} for that node"
        findings.append(Finding("network.names", Severity.WARNING, names(where), what, ways))
    if lost and not found:
        what = "host names of other nodes do not resolve, on any node; ray-ft goes by addresses"
        findings.append(Finding("network.names", Severity.NOTE, names(nodes), what))
    else:
        for (name, why), where in lost.items():
            what = f"the name {name} does not resolve there, while others do: {why}"
            findings.append(Finding("network.names", Severity.WARNING, names(where), what, ways))
    if not findings and len(nodes) > 1:
        findings.append(Finding("network.names", Severity.OK, names(nodes), "host names lead to the nodes"))
    return findings


def _same(name: str, facts: Mapping[str, Any], address: str, nodes: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the name means another node as well: several Ray nodes on one machine have one name."""
    return facts["host_name"] == name or sum(one["host_name"] == name for one in nodes.values()) > 1


def _mtu(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    sizes = {name: _taken(facts)["mtu"] for name, facts in nodes.items() if _taken(facts)}
    if len(set(sizes.values())) < 2:
        return []
    usual = max(multimode(sizes.values()))
    odd = {name: size for name, size in sizes.items() if size != usual}
    said = ", ".join(f"{nodes[name]['chosen']} {size}" for name, size in sorted(odd.items())[:3])
    return [
        Finding(
            "network.mtu",
            Severity.WARNING,
            names(odd),
            f"the MTU is {said} bytes there and {usual} elsewhere: large packets may vanish while small ones pass",
            (f"ip link set dev INTERFACE mtu {usual}, or the smaller one on every node and switch between them",),
        )
    ]


def _faster(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A node's fast card stands idle while a slow one is used; of no matter where there is RDMA."""
    findings: list[Finding] = []
    for name, facts in nodes.items():
        used = _taken(facts)
        if len(nodes) < 2 or not used or facts["environment"] or rdma.active(facts["rdma"]):
            continue
        mbps = 0 if used["virtual"] else used["mbps"]
        for other, one in facts["interfaces"].items():
            real = one["up"] and one["addresses"] and not one["virtual"]  # as docker0 and VPNs are
            if other != facts["chosen"] and real and 0 < mbps < FAST_ENOUGH and one["mbps"] >= FASTER * mbps:
                what = f"{other} has {one['mbps'] // 1000} Gb/s, {facts['chosen']}, which is used, {mbps / 1000:g}"
                ways = (
                    f"start Ray with the address of {other}: --node-ip-address={one['addresses'][0]}, likewise on all",
                    f"or set GLOO_SOCKET_IFNAME={other} and NCCL_SOCKET_IFNAME={other} where Ray is started",
                )
                findings.append(Finding("network.faster", Severity.WARNING, name, what, ways))
                break
    return findings


def _taken(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return facts["interfaces"].get(facts["chosen"], {})
