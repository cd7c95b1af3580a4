"""What runs inside the replicas: bringing the model to its node, starting the engine, answering HTTP.

Ray Serve loads these by name. Limits: a local folder has to be visible on the replica's node (shared storage); a URI is
copied once per node and content, as `paths.local_copy` does.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import ray
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve._private import replica as serve_replica
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress

from ray_ft import paths
from ray_ft.errors import ServeError


class LocalFolder(CallbackBase):
    """Points the engine at a local folder with the content of ``folder``, a path or URI."""

    async def on_before_node_init(self) -> None:
        location = self.kwargs["folder"]
        local = await asyncio.to_thread(paths.local_copy, location)
        if not os.path.isdir(local):
            raise ServeError(
                f"model folder {local!r} is not there on node {socket.gethostname()!r}, where the replica runs",
                ["use storage that all nodes share, or a URI (s3://…, gs://…)"],
            )
        self.llm_config.get_engine_config().hf_model_id = local
        # Ray's own download would start one more process that imports vLLM (9 s on two cores) to find nothing to do.
        self.ctx.run_init_node = False


class Server(LLMServer):
    """Ray's server without its usage report, which starts another process (0.24 GiB, 4 s) before the first answer."""

    async def _start_engine(self) -> None:
        _listen_on_loopback()
        await self.engine.start()


class Ingress(OpenAiIngress):
    """Ray's HTTP side of the OpenAI protocol."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _listen_on_loopback()
        super().__init__(*args, **kwargs)


def _listen_on_loopback() -> None:
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
