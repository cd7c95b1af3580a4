"""Network cards that move data past the kernel: InfiniBand, RoCE, EFA, and Google's cards for GPUDirect.

What is there is read from /sys, and whether a process may use it: its devices in /dev/infiniband, memory that it may
lock, the library or plugin by which NCCL drives it. Each of them lacking makes NCCL take TCP sockets without an error.
Limits: Linux; that the switches let the traffic through is only known once something was sent (see `fabric`).
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_ft.doctor.finding import Finding, Severity, names

#: What NCCL and libfabric read that changes which network is taken.
VARIABLES = ("NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
AMAZON, MELLANOX = "0x1d0f", "0x15b3"  # PCI vendors
EFA_CARDS = re.compile("0xefa")  # Amazon's device numbers of EFA: 0xefa0 to 0xefa3 so far
NETWORK_CLASS = "0x02"  # of PCI: a network controller
GOOGLE_DRIVER = "gve"
#: Google's machines that have cards for GPUDirect beside the ordinary one have four or eight of them.
GOOGLE_CARDS = 4
#: Bytes: a process that may lock less cannot register the buffers of one communicator.
LOCKABLE = 1 << 30


def look(root: Path = Path("/")) -> dict[str, Any]:
    """The facts of this node.

    Args:
        root: where sys and dev are.

    Returns:
        devices: {name, kind, gbps, active} of each port: kind "InfiniBand", "RoCE" or "EFA"; gbps as the card says.
        verbs: whether /dev/infiniband has them for this process.
        cards: how many network cards of EFA's and Mellanox's are on the PCI bus.
        google: how many network cards of Google's there are.
        lockable: bytes of memory that a process may lock; None: no limit.
        libraries: whether libibverbs and NCCL's plugin for EFA can be loaded; only asked where there is a device.
        environment: those of `VARIABLES` that are set.
    """
    devices = _devices(root / "sys/class/infiniband")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "devices": devices,
        "verbs": any((root / "dev/infiniband").glob("uverbs*")),
        "cards": _cards(root / "sys/bus/pci/devices"),
        "google": sum(_driver(one) == GOOGLE_DRIVER for one in (root / "sys/class/net").glob("*")),
        "lockable": None if limit == resource.RLIM_INFINITY else limit,
        "libraries": _libraries(devices),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _devices(folder: Path) -> list[dict[str, Any]]:
    found = []
    for device in sorted(folder.glob("*")):
        for port in sorted(device.glob("ports/*")):
            layer = _text(port / "link_layer")
            efa = _driver(device) == "efa" or device.name.startswith("efa_") or layer == "Unspecified"
            kind = "EFA" if efa else "RoCE" if layer == "Ethernet" else layer or "unknown"
            rate = re.match(r"[\d.]+", _text(port / "rate"))  # "400 Gb/sec (4X NDR)"
            found.append(
                {
                    "name": f"{device.name}:{port.name}",
                    "kind": kind,
                    "gbps": float(rate[0]) if rate else 0.0,
                    "active": "ACTIVE" in _text(port / "state"),  # "4: ACTIVE"
                }
            )
    return found


def _cards(folder: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for card in folder.glob("*"):
        if not _text(card / "class").startswith(NETWORK_CLASS):
            continue
        vendor, device = _text(card / "vendor"), _text(card / "device")
        counts["EFA"] += vendor == AMAZON and EFA_CARDS.match(device) is not None
        counts["Mellanox"] += vendor == MELLANOX
    return dict(counts)


def _libraries(devices: list[dict[str, Any]]) -> dict[str, bool]:
    wanted = {"libibverbs.so.1"} if devices else set()
    if any(device["kind"] == "EFA" for device in devices):
        wanted.add("libnccl-net.so")
    return {name: _loads(name) for name in sorted(wanted)}


def _loads(library: str) -> bool:
    """Tried in a process of its own: such libraries start threads and take hold of devices."""
    command = [sys.executable, "-S", "-E", "-c", f"import ctypes; ctypes.CDLL({library!r})"]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _driver(device: Path) -> str:
    link = device / "device/driver"
    return link.resolve().name if link.exists() else ""


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):  # some ports refuse to be read while they are down
        return file.read_text().strip()
    return ""


def active(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ports that carry traffic."""
    return [device for device in facts.get("devices", ()) if device["active"]]


def fabric_of(facts: Mapping[str, Any]) -> str:
    """What NCCL should use between such nodes, in words; "" where there is nothing but ordinary Ethernet."""
    kinds = Counter((device["kind"], device["gbps"]) for device in active(facts))
    if kinds:
        return ", ".join(f"{count} × {kind} {gbps:g} Gb/s" for (kind, gbps), count in sorted(kinds.items()))
    if cards := facts.get("cards", {}).get("EFA"):
        return f"{cards} EFA cards"
    if facts.get("google", 0) > GOOGLE_CARDS:  # beside the ordinary one
        return f"{facts['google'] - 1} network cards for GPUDirect-TCPX"
    return ""


def check(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What lacks on nodes that are to use such a network.

    Args:
        nodes: what `look` said, by node; only of nodes with GPUs.
    """
    findings: list[Finding] = []
    for node, facts in nodes.items():
        findings += _usable(node, facts)
    kinds = {node: fabric_of(facts) for node, facts in nodes.items()}
    if len(set(kinds.values())) > 1:
        said = "; ".join(f"{node}: {kind or 'none'}" for node, kind in sorted(kinds.items())[:4])
        findings.append(
            Finding(
                "fabric.alike",
                Severity.WARNING,
                names(kinds),
                f"the nodes with GPUs have different fast networks in use: {said}",
                ("look at ports that are down: ibstat, or rdma link", "use one machine type for all workers"),
            )
        )
    elif kinds and not findings:
        kind = next(iter(kinds.values()))
        said = kind or "ordinary Ethernet alone; training over several nodes will be limited by it"
        findings.append(Finding("fabric.devices", Severity.OK if kind else Severity.NOTE, names(kinds), said))
    return findings


def _usable(node: str, facts: Mapping[str, Any]) -> list[Finding]:
    findings = []

    def lacks(name: str, severity: Severity, what: str, *ways: str) -> None:
        findings.append(Finding(name, severity, node, what, ways))

    ports, environment = active(facts), facts["environment"]
    there = ", ".join(device["name"] for device in ports[:3]) + (" …" if len(ports) > 3 else "")
    # The others are of no use to who may not open them, so one is said at a time.
    if not facts["devices"] and (cards := {name: count for name, count in facts["cards"].items() if count}):
        said = " and ".join(f"{count} of {name}" for name, count in cards.items())
        lacks(
            "fabric.driver",
            Severity.WARNING if cards.get("EFA") else Severity.NOTE,  # Mellanox also makes ordinary ones
            f"network cards ({said}) are on the PCI bus, and /sys/class/infiniband is empty: no driver has them",
            "load the driver: efa, or mlx5_ib (MLNX_OFED or rdma-core)",
            "use a machine image that has it",
        )
    elif ports and not facts["verbs"]:
        lacks(
            "fabric.access",
            Severity.ERROR,
            f"{there}: no /dev/infiniband/uverbs* here, so NCCL falls back to TCP sockets",
            "in a container: docker --device=/dev/infiniband; on Kubernetes the RDMA or EFA device plugin",
            "load the module ib_uverbs",
        )
    elif ports:
        for library, loads in facts["libraries"].items():
            if not loads:
                what = "NCCL's plugin for EFA (aws-ofi-nccl)" if library == "libnccl-net.so" else "the verbs library"
                lacks(
                    "fabric.library",
                    Severity.ERROR,
                    f"{there}: {library}, {what}, cannot be loaded, so NCCL falls back to TCP sockets",
                    "install it (the EFA installer has both; otherwise the package libibverbs1 or rdma-core)",
                    "name its folder in LD_LIBRARY_PATH before Ray starts",
                )
        if facts["lockable"] is not None and facts["lockable"] < LOCKABLE:
            lacks(
                "fabric.memlock",
                Severity.WARNING,
                f"a process may lock {facts['lockable'] >> 10:,} KiB of memory; NCCL registers far more with {there}",
                "ulimit -l unlimited before Ray starts; in a container --ulimit memlock=-1 or IPC_LOCK",
            )
    if ports and (off := _switched_off(environment, ports)):
        lacks(
            "fabric.disabled",
            Severity.ERROR,
            f"{off} in Ray's environment: NCCL does not use {there}",
            f"unset {off.partition('=')[0]} where Ray is started",
        )
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        if environment.get(name, "0") not in ("", "0"):
            lacks(
                "fabric.disabled",
                Severity.WARNING,
                f"{name}={environment[name]} in Ray's environment: GPUs of one node talk by a slower way",
                f"unset {name} where Ray is started",
            )
    return findings


def _switched_off(environment: Mapping[str, str], ports: list[dict[str, Any]]) -> str:
    verbs = any(port["kind"] != "EFA" for port in ports)  # EFA's plugin does not read it
    if verbs and environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        return f"NCCL_IB_DISABLE={environment['NCCL_IB_DISABLE']}"
    if environment.get("NCCL_NET", "").lower() == "socket":
        return f"NCCL_NET={environment['NCCL_NET']}"
    return ""
