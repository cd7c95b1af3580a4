"""Addresses that are listened on: whether they can be, doing it, and how others reach them."""

from __future__ import annotations

import socket

from ray_ft.errors import ServeError
from ray_ft.hosts import bracketed

BACKLOG = 2048  # connections that wait to be taken


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: one that is free."""
    return socket.create_server((host, port), family=_family(host), backlog=BACKLOG)


def reachable(host: str) -> str:
    """The host of a URL under which this machine reaches what listens there."""
    return bracketed({"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        ServeError: the port is none, taken or reserved, or the address is unknown or not one of this machine.
    """
    check_range(port)
    family = _family(host)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As Serve's proxy does: a port whose last user has just gone is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            with socket.socket(family, socket.SOCK_STREAM) as other:
                try:
                    other.bind((host, 0))
                    free: int | None = other.getsockname()[1]
                except OSError:
                    free = None
            raise ServeError(
                f"cannot listen on serve.host {host!r}, serve.port {port}: {error.strerror}",  # of names, too
                [
                    f"choose another port, such as the free {free}: --port {free}",
                    f"see who has it: ss -ltnp 'sport = :{port}'",
                ]
                if free
                else ["choose an address of this machine: --host 127.0.0.1"],
            ) from error


def check_range(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ServeError(
            f"serve.port {port} is not a port: they go from 1 to 65535",
            ["choose another: --port 8000", "leave --port out: serve.port of the recipe"],
        )
