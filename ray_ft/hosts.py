"""Hosts, as a person, a URL or a ``Host`` header writes them; and which network interface has a host's address."""

from __future__ import annotations

import ipaddress
import os
import socket


def is_loopback(host: str) -> bool:
    """Whether it is this machine alone. 127.example.org is a name, and may be anybody's."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """As it stands in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def interface_of(address: str) -> str:
    """The name of this machine's network interface that has the address; "" if none has.

    An interface with a second address may be listed as "eth0:1"; what programs are told is the interface, "eth0".
    """
    import psutil

    wanted = address.strip("[]")
    for name, found in psutil.net_if_addrs().items():
        for one in found:
            ip = one.family in (socket.AF_INET, socket.AF_INET6)
            if ip and one.address.partition("%")[0] == wanted:  # psutil writes fe80::1%eth0
                return name.partition(":")[0]
    return ""


def choose_interface(address: str) -> None:
    """Let gloo and NCCL of this process talk over the interface that has this node's address.

    Left alone they ask what the host name resolves to, which in many clusters is loopback or nothing. What the
    environment says already is left as it is, and so it is where no interface has the address.
    """
    if name := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this name, not all that begin with it


def nccl_takes(setting: str, interfaces: list[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME allows, of those given.

    The setting is a comma-separated list of beginnings of names; "=" before it: whole names; "^": all others (NCCL's
    documentation of its environment variables).
    """
    others, text = setting.startswith("^"), setting.lstrip("^")
    exact, wanted = text.startswith("="), [part for part in text.lstrip("=").split(",") if part]
    hit = [name for name in interfaces if any(name == part if exact else name.startswith(part) for part in wanted)]
    return [name for name in interfaces if name not in hit] if others else hit
