"""What runs inside the replicas of an engine: bringing weights to the node, starting vLLM, answering HTTP.

Ray Serve loads these by name. Limits: a local folder has to be visible on the replica's node (shared storage); a URI is
copied once per node and content, as `paths.local_copy` does.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm.deployment import LLMServer

from serving import models
from serving.engine import STALL
from serving.front import Front, on_step
from serving.loopback import listen_on_loopback


class Folders(CallbackBase):
    """Brings weights and adapters to this node, checks them, and points the engine at them.

    Arguments of `LLMConfig.callback_config`: ``folder`` and ``files`` (name → bytes, sha256; empty for a base, of which
    no checksums are known), ``adapters``: a list of {``name``, ``folder``, ``files``}.
    """

    async def on_before_node_init(self) -> None:
        config = self.llm_config.get_engine_config()
        config.hf_model_id = await asyncio.to_thread(models.local, self.kwargs["folder"], self.kwargs["files"])
        if self.kwargs["adapters"]:
            from vllm.entrypoints.openai.models.protocol import LoRAModulePath

            config.frontend_kwargs["lora_modules"] = [
                LoRAModulePath(each["name"], await asyncio.to_thread(models.local, each["folder"], each["files"]))
                for each in self.kwargs["adapters"]
            ]
        # Ray's own download would start one more process that imports vLLM (9 s on two cores) to find nothing to do.
        self.ctx.run_init_node = False


class Server(LLMServer):
    """Ray's server, with the engine's own HTTP server in it, and without the usage report (0.24 GiB, 4 s)."""

    async def _start_engine(self) -> None:
        listen_on_loopback()
        assert self.engine is not None
        await self.engine.start()
        self._front = Front(await self.engine.build_asgi_app(), ray.util.get_node_ip_address())
        await self._front.start()
        on_step(self.engine._engine_client, self._front.moved)
        # As `vllm serve` does: what is there now stays, and a collection that went through it would stop all answers.
        gc.collect()
        gc.freeze()

    async def hold(self) -> AsyncIterator[dict[str, Any]]:
        async for place in self._front.hold():
            yield place

    async def check_health(self) -> None:
        """Serve replaces a replica that fails this three times in a row.

        Raises:
            RuntimeError: the engine is dead, or gives nothing though it is asked.
        """
        await super().check_health()
        if not self._front.alive:
            raise RuntimeError("the engine's HTTP server has ended")
        patience = 2 * self._llm_config.experimental_configs[STALL]  # the gateway says so after half of it
        if self._front.idle_seconds() > patience:
            raise RuntimeError(f"the engine gave no token for {patience:g} s though requests are under way")
