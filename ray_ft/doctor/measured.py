"""What a measurement of `fabric` means: the transport against what there is, the speed against links and the others.

Pure functions of what was measured and of what `network.look` said. Limits: cards that share a GPU's traffic are not
added up, so half of one port's speed is what is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

from ray_ft.doctor import nccl_log, rdma
from ray_ft.doctor.finding import Finding, Severity, names

MIB = 1 << 20
#: Bytes a second: a network slower than that, less than one gigabit, holds up any training over several nodes.
FLOOR = 100e6
#: Shares of a link's speed that are expected at least. RDMA reaches nine tenths; TCP is limited by the processor, and
#: by what else it does, so only slow links are held against their speed.
OF_RDMA, OF_ETHERNET = 0.5, 0.25
MOST_OF_ETHERNET = 10_000  # Mb/s
FAR_BELOW = 1 / 3  # of the median of all nodes
STEPS = {
    "open": "a process for measuring does not start, or cannot listen at the node's address",
    "host": "a store for the group cannot be opened at the node's address",
    "join": "the processes do not find one another",
    "all_reduce": "an all-reduce fails",
    "exchange": "an exchange between two nodes fails",
}


def check(measured: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What follows from a measurement.

    Args:
        measured: what `measure` returned.
        nodes: what `network.look` said, by the name that findings call the node.

    Returns:
        Findings named fabric.measured, .reach, .connect, .transport, .gpudirect, .peers, .bandwidth, .node.
    """
    called = {facts["address"]: name for name, facts in nodes.items()}
    facts_of = {facts["address"]: facts for facts in nodes.values()}
    findings = [_skipped(why, [called.get(one, one)]) for one, why in measured["skipped"].items()]
    if measured["nothing"]:
        return [*findings, Finding("fabric.measured", Severity.NOTE, "cluster", f"not measured: {measured['nothing']}")]
    for address, lost in measured["blocked"].items():
        to = names(called.get(other, other) for other in lost)
        what = f"cannot connect to {to} at a free port: {next(iter(lost.values()))}"
        ways = (
            "let all TCP ports through between the nodes: gloo and NCCL take any",
            "look for a firewall on the nodes",
        )
        findings.append(Finding("fabric.reach", Severity.ERROR, called.get(address, address), what, ways))
    if failed := measured["failed"]:
        where = names(called.get(address, address) for address in failed["why"])
        what = f"{STEPS.get(failed['step'], failed['step'])}: {next(iter(failed['why'].values()))}"
        ways = (
            "ray-ft doctor --json has what each node says of its network; network.* come first",
            "NCCL_DEBUG=INFO in Ray's environment makes NCCL say more in the workers' logs",
        )
        findings.append(Finding("fabric.connect", Severity.ERROR, where, what, ways))
    if not measured["all_reduce"]:
        return findings
    several = len(measured["nodes"]) > 1
    findings += _transport(measured, facts_of, called) if several else []
    findings += _peers(measured, called)
    findings += _speed(measured, facts_of, called) if several else []
    if not any(finding.severity >= Severity.WARNING for finding in findings):
        findings.append(
            Finding("fabric.bandwidth", Severity.OK, names(_took_part(measured, called)), _in_words(measured))
        )
    return findings


def _skipped(why: str, where: list[str]) -> Finding:
    return Finding("fabric.measured", Severity.NOTE, names(where), f"left out of the measurement: {why}")


def _took_part(measured: Mapping[str, Any], called: Mapping[str, str]) -> list[str]:
    return [called.get(node["address"], node["address"]) for node in measured["nodes"]]


def _in_words(measured: Mapping[str, Any]) -> str:
    row = measured["all_reduce"][-1]
    ranks = sum(node["ranks"] for node in measured["nodes"])
    by = sorted({network for log in measured["logs"].values() for network in log["networks"]})
    over = f"{measured['backend']}{' by ' + ', '.join(by) if by else ''}"
    text = f"all-reduce of {row['bytes'] / MIB:g} MiB over {ranks} ranks, {over}: bus bandwidth {_rate(row['busbw'])}"
    if measured["within"]:
        text += f"; within a node {_rate(min(measured['within'].values()))}"
    return text


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.1f} GB/s" if speed >= 1e9 else f"{speed / 1e6:.1f} MB/s"


def _transport(
    measured: Mapping[str, Any], facts_of: Mapping[str, Mapping[str, Any]], called: Mapping[str, str]
) -> list[Finding]:
    """By what NCCL went between nodes, against what there is."""
    slow: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    plain, copied, direct = [], [], []
    for address, log in measured["logs"].items():
        name = called.get(address, address)
        there = rdma.fabric_of(facts_of[address]["rdma"]) if address in facts_of else ""
        sockets = [network for network in log["networks"] if network in nccl_log.SOCKETS]
        if sockets and there:
            slow[there, log["warnings"][0] if log["warnings"] else ""].append(name)
        elif sockets:
            plain.append(name)
        elif "NET/IB" in log["networks"] and not log["direct"]:
            copied.append(name)
        else:
            direct.append(name)
    findings = []
    for (there, warning), where in slow.items():
        what = f"NCCL goes over TCP sockets, and there is {there}" + (f"; it warns: {warning}" if warning else "")
        ways = (
            "see what else is said of fabric.*; then NCCL_DEBUG=INFO in Ray's environment tells in the workers' logs",
            "InfiniBand and RoCE: the container needs /dev/infiniband, libibverbs and locked memory",
            "EFA: aws-ofi-nccl and libfabric on LD_LIBRARY_PATH; Google's: its NCCL plugin and the daemon beside it",
        )
        findings.append(Finding("fabric.transport", Severity.ERROR, names(where), what, ways))
    if plain:
        what = "NCCL goes over TCP sockets: there is no faster network here"
        findings.append(Finding("fabric.transport", Severity.NOTE, names(plain), what))
    if copied:
        what = "NCCL uses RDMA by way of the host's memory, not from GPU to card (no GDRDMA in its log)"
        module = "load nvidia-peermem, or a kernel and driver with DMA-BUF"
        settings = "look at IOMMU and ACS settings of the host"
        findings.append(Finding("fabric.gpudirect", Severity.WARNING, names(copied), what, (module, settings)))
    if direct:
        used = sorted({network for log in measured["logs"].values() for network in log["networks"]})
        what = f"NCCL goes by {', '.join(used) or 'memory alone'}"
        findings.append(Finding("fabric.transport", Severity.OK, names(direct), what))
    return findings


def _peers(measured: Mapping[str, Any], called: Mapping[str, str]) -> list[Finding]:
    """GPUs of one node that NCCL joins through the host's memory."""
    where = [called.get(one, one) for one, log in measured["logs"].items() if log["channels"].get("SHM")]
    if not where:
        return []
    what = "NCCL copies between GPUs of the node through the host's memory (SHM), not from one to the other (P2P)"
    ways = (
        "nvidia-smi topo -p2p r: cards without NVLink may not be able to; then this is all there is",
        "on a virtual machine or with ACS on, peer access over PCIe is off: see NCCL's troubleshooting",
    )
    return [Finding("fabric.peers", Severity.WARNING, names(where), what, ways)]


def _speed(
    measured: Mapping[str, Any], facts_of: Mapping[str, Mapping[str, Any]], called: Mapping[str, str]
) -> list[Finding]:
    """Against the link's speed, a floor, and the other nodes. A node is as fast as the faster of its two pairs."""
    best: defaultdict[str, float] = defaultdict(float)
    for one, other, speed in measured["pairs"]:
        for address in (one, other):
            best[address] = max(best[address], speed)
    findings = []
    usual = median(best.values())
    ways = (
        "look at the node's link, cable and switch port: ethtool INTERFACE, ibstat; and at what else uses it",
        "leave the node out of the run",
    )
    odd = [one for one, speed in best.items() if len(best) > 2 and speed < FAR_BELOW * usual]
    for address in odd:
        what = f"it exchanges {_rate(best[address])} with its neighbours, others {_rate(usual)}"
        findings.append(Finding("fabric.node", Severity.WARNING, called.get(address, address), what, ways))
    inside = measured["within"]
    for address, speed in inside.items():
        if len(inside) > 2 and speed < FAR_BELOW * median(inside.values()):
            what = (
                f"its GPUs reduce at {_rate(speed)} among themselves, other nodes' at {_rate(median(inside.values()))}"
            )
            findings.append(Finding("fabric.node", Severity.WARNING, called.get(address, address), what, ways))
    below: defaultdict[str, list[str]] = defaultdict(list)
    for address, speed in best.items():
        if address not in odd and (why := _below(speed, facts_of.get(address), measured["backend"])):
            below[why].append(address)
    for why, where in below.items():
        slowest = min(best[address] for address in where)
        what = f"two nodes exchange {_rate(slowest)} in each direction: {why}"
        named = names(called.get(address, address) for address in where)
        findings.append(Finding("fabric.bandwidth", Severity.WARNING, named, what, ways))
    return findings


def _below(speed: float, facts: Mapping[str, Any] | None, backend: str) -> str:
    """Why so many bytes a second are too few; "" if they are not."""
    if facts is not None and backend == "nccl":
        fastest = max((port["gbps"] for port in rdma.active(facts["rdma"])), default=0.0)
        if speed * 8 < OF_RDMA * fastest * 1e9:
            return f"less than half of one port's {fastest:g} Gb/s"
    if facts is not None:
        one = facts["interfaces"].get(facts["chosen"])
        mbps = 0 if one is None or one["virtual"] else min(one["mbps"], MOST_OF_ETHERNET)
        if speed * 8 < OF_ETHERNET * mbps * 1e6:
            return f"less than a quarter of what {facts['chosen']} can, {one['mbps'] / 1000:g} Gb/s"
    if speed < FLOOR:
        return "less than one gigabit a second holds up any training over several nodes"
    return ""
