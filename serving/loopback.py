"""Keeping what a replica listens on by itself off the network, where the cluster is this machine alone."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica


def listen_on_loopback() -> None:
    """Keep this replica's internal gRPC port off the network where the cluster is this machine alone.

    Ray 2.60 opens it on all interfaces, after the constructor, with nothing but Ray's token before code that unpickles
    what arrives. Peers only ever use the node's address, which is loopback on such a cluster.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    add_port = serve_replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    serve_replica.add_port_to_grpc_server = add_loopback_port
