"""Ports for servers that are started by number."""

from __future__ import annotations

import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 20_000  # below: 10,002 to 19,999, which `ray start` keeps for its workers and takes no other port from


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free, all different.

    None is one that the kernel gives to outgoing connections: Ray alone has hundreds of these, and one that took the
    port meanwhile has ended a node ("Address already in use").
    """
    highest = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_768
    found: list[int] = []
    for port in random.sample(range(LOWEST, highest), highest - LOWEST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"{count} free ports between {LOWEST} and {highest} are wanted, {len(found)} were found")
