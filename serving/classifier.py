"""Classification models: the probability of each label, computed by transformers in batches.

vLLM serves them too, but a classifier's work is one forward pass, for which its engine's processes and cache are weight
without use. Requests that come together are computed together. The replica looks to the gateway like one of vLLM's: a
place, a ticket, and HTTP (`serving.front`).

Limits: one GPU or the node's CPUs for each replica; a text longer than the model's context is refused, never cut.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving import models
from serving.front import Front
from serving.loopback import listen_on_loopback

if TYPE_CHECKING:
    from ray.serve import Application

    from serving.engine import Plan

BATCH_WAIT = 0.003  # seconds that a text waits for others


class Classifier:
    """One replica.

    Args:
        name: what clients call the model.
        folder, files: the export, and what its manifest says of the files.
        device: ``gpu`` or ``cpu``.
        max_len: longest text, in tokens.
        batch: most texts computed together.
        patience: seconds without a batch, though texts wait, after which the replica is replaced.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, name: str, folder: str, files: Mapping[str, Any], device: str, max_len: int, batch: int,
        patience: float,
    ) -> None:  # fmt: skip
        import ray
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        listen_on_loopback()
        self._name, self._max_len, self._patience = name, max_len, patience
        here = await asyncio.to_thread(models.local, folder, dict(files))
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(here, trust_remote_code=False)
        model = (
            AutoModelForSequenceClassification.from_pretrained(here, dtype="auto", trust_remote_code=False)
            .to(self._device)
            .eval()
        )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # By it the model finds the last token of each text. With parts, it is the language model's that counts.
        model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        # Once alone, by which it forgets the truncation of its file: later calls, in threads, change nothing in it.
        self._tokenizer("a")
        self._model, self._torch = model, torch
        self._labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
        self._classify.set_max_batch_size(batch)
        app = Starlette(routes=[Route("/v1/classify", self._answer, methods=["POST"])])
        self._front = Front(app, ray.util.get_node_ip_address())
        await self._front.start()

    async def hold(self) -> AsyncIterator[dict[str, Any]]:
        async for place in self._front.hold():
            yield place

    async def check_health(self) -> None:
        if not self._front.alive:
            raise RuntimeError("the classifier's HTTP server has ended")
        if self._front.idle_seconds() > self._patience:
            raise RuntimeError(f"no batch was done for {self._patience:g} s though requests are under way")

    async def _answer(self, request: Request) -> JSONResponse:
        try:
            asked = json.loads(await request.body())["input"]
        except (ValueError, KeyError, TypeError):
            return _refused("the body has no 'input'")
        texts = [asked] if isinstance(asked, str) else asked
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            return _refused("'input' is a text that is not empty, or a list of such texts")
        # In a thread: megabytes of text take a second, in which nobody else would be answered.
        rows: list[list[int]] = await asyncio.to_thread(lambda: self._tokenizer(texts)["input_ids"])
        longest = max(map(len, rows))
        if not all(rows):
            return _refused("a text has no token")
        if longest > self._max_len:
            return _refused(f"a text has {longest} tokens, and this model's maximum context length is {self._max_len}")
        found = await asyncio.gather(*(self._classify(row) for row in rows))
        data = [
            {"index": at, "label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}
            for at, probabilities in enumerate(found)
        ]
        tokens = sum(map(len, rows))
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": self._name, "data": data, "usage": usage})

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=BATCH_WAIT)
    async def _classify(self, rows: list[list[int]]) -> list[dict[str, float]]:
        found = await asyncio.to_thread(self._compute, rows)
        self._front.moved()
        return found

    def _compute(self, rows: list[list[int]]) -> list[dict[str, float]]:
        torch = self._torch
        inputs = self._tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return [dict(zip(self._labels, each, strict=True)) for each in logits.float().softmax(-1).cpu().tolist()]


def _refused(message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "code": 400, "param": "input"}
    return JSONResponse({"error": error}, status_code=400)


def deployment(plan: Plan) -> Application:
    """The deployment of a classifier."""
    from serving import engine

    model = plan.model
    assert model.own is not None
    actor: dict[str, Any] = {"num_cpus": plan.cpus_reserved, "runtime_env": {"env_vars": dict(plan.env)}}
    if plan.gpus_per_replica:
        actor["num_gpus"] = plan.gpus_per_replica
    options = {**engine.serve_options(plan), "ray_actor_options": actor}
    return serve.deployment(Classifier, name=f"classifier-{model.name.replace('/', '--')}", **options).bind(
        model.name, model.folder, model.own.manifest.content["files"], plan.device, plan.engine["max_model_len"],
        plan.max_num_seqs, 2 * plan.stall_seconds,
    )  # fmt: skip
