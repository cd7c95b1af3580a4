"""What NCCL says of itself with NCCL_DEBUG=INFO: which network it took, and by what each channel goes.

Lines are recognised by what NCCL 2.18 to 2.29 and the plugins of AWS and Google print; others are passed over. Limits:
that P2P goes over NVLink rather than PCIe is not said there (see `gpus`).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

#: Beginnings of what stands after "via NET/" or "Using network", and the transport that each is.
NETWORKS = {
    "IB": "NET/IB",  # InfiniBand and RoCE; IBext of the HPC-X plugin
    "OFI": "NET/OFI",  # libfabric, which is how NCCL uses EFA
    "AWS Libfabric": "NET/OFI",
    "Libfabric": "NET/OFI",
    "FasTrak": "NET/FasTrak",  # GPUDirect-TCPXO
    "GPUDirectTCPX": "NET/TCPX",
    "FastSocket": "NET/FastSocket",  # Google's; still TCP
    "gIB": "NET/IB",  # Google's, of RoCE
    "Socket": "NET/Socket",
}
#: Those that are TCP through the kernel: the host copies every byte.
SOCKETS = ("NET/Socket", "NET/FastSocket")
_CHANNEL = re.compile(r"NCCL INFO Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\](?: \[(?:send|receive)\])? via (.+)")
_NETWORK = re.compile(r"NCCL INFO Using network (.+)")
_VERSION = re.compile(r"NCCL version (\d[\w.]*)")
_CARDS = re.compile(r"NCCL INFO (NET/\w+) : Using (\[0\].+)")
_WARNING = re.compile(r"NCCL WARN (.+)")
MOST_WARNINGS = 3


def read(text: str) -> dict[str, Any]:
    """The facts in the output of one or several ranks.

    Returns:
        version: of NCCL, or "".
        networks: transports between nodes that were chosen, such as ["NET/IB"]; none on one node alone, maybe.
        channels: how many channels go by each transport: NET/…, P2P, SHM.
        direct: of the channels over a network, how many move data between card and GPU without the host's memory.
        cards: the line that names the network cards in use, or "".
        warnings: the first few things that NCCL warned of.
    """
    channels: Counter[str] = Counter()
    networks: list[str] = []
    warnings: list[str] = []
    direct, version, cards = 0, "", ""
    for line in text.splitlines():
        if found := _CHANNEL.search(line):
            transport = _transport(found[1])
            channels[transport] += 1
            direct += transport.startswith("NET/") and "/GDRDMA" in found[1]
        elif found := _NETWORK.search(line):
            network = _network(found[1].strip())
            networks += [network] * (network not in networks)
        elif found := _VERSION.search(line):
            version = version or found[1]
        elif found := _WARNING.search(line):
            if len(warnings) < MOST_WARNINGS and found[1] not in warnings:
                warnings.append(found[1].strip()[:200])
        elif found := _CARDS.search(line):
            cards = cards or f"{found[1]}: {found[2].strip()[:200]}"
    # What the channels go by is what is used; the network that was chosen, what would be used if there were a need.
    used = [name for name in channels if name.startswith("NET/")]
    return {
        "version": version,
        "networks": sorted(used or networks),
        "channels": dict(channels),
        "direct": direct,
        "cards": cards,
        "warnings": warnings,
    }


def _transport(via: str) -> str:
    if via.startswith("NET/"):
        return _network(via.removeprefix("NET/"))
    return via.split("/")[0].strip()  # P2P/CUMEM, P2P/IPC, SHM/direct/direct


def _network(name: str) -> str:
    for beginning, transport in NETWORKS.items():
        if name.startswith(beginning):
            return transport
    return f"NET/{name.split('/')[0]}"
