"""Answers from vLLM inside Ray Data (`ray.data.llm`): the fast way through many prompts, on GPUs or on CPU.

Prompts are tokenized here, so that they are what training rendered, and streamed in parts of bounded size; each part
starts the engines once. Limits: whole models alone (no adapter), NVIDIA GPUs or CPUs, text alone, and one engine's GPUs
on one node.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import socket
import sys
from collections.abc import Generator, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_ft import placement
from ray_ft.answers.found import Found, local_folder
from ray_ft.answers.plan import Plan, plan_cpu, plan_gpus
from ray_ft.answers.prompt import Rendered
from ray_ft.answers.target import Answer, Prompt, Sampling
from ray_ft.errors import ModelError, ServeError
from ray_ft.vllm_failure import cause

#: Prompts of one part: an engine needs a minute or more to start, and hundreds of tokens each for all of these keep it
#: busy for half an hour; as token ids they take some 400 MB.
PART = 100_000


class Offline:
    """The engine; use `opened`, in a block that is connected to Ray.

    Args:
        what: a folder with all weights.
        gpus: GPUs to use, of those that the cluster has; 0: the CPUs of one node.
    """

    name = "vllm"

    def __init__(self, what: Found, batch_size: int, gpus: int) -> None:
        self.model, self.identity = what.name, what.identity
        self._what, self._batch_size, self._gpus = what, batch_size, gpus

    @cached_property
    def _folder(self) -> str:
        """The model's folder, at the same place on every node that can answer."""
        return on_every_node(self._what.source, self._gpus > 0)

    @cached_property
    def _plan(self) -> Plan:
        return plan_gpus(self._what, self._gpus, _gpu_bytes()) if self._gpus else plan_cpu(self._what, *_node())

    @property
    def special(self) -> re.Pattern[str] | None:
        return self._what.encoder.special

    def answers(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Answer]:
        stream = iter(prompts)
        while part := list(itertools.islice(stream, PART)):
            if any(prompt.has_images for prompt in part):
                raise ModelError(
                    "vLLM gets text alone here, and a prompt has an image", ["ask with --engine transformers"]
                )
            encoder = self._what.encoder
            encoded = [encoder.encode(prompt, sampling) for prompt in part]
            asked = [one for one in encoded if isinstance(one, Rendered)]
            with contextlib.closing(self._generated(asked, sampling)) as generated:
                for one in encoded:
                    yield one if isinstance(one, Answer) else _answer(self._what, one, next(generated))

    def _generated(self, asked: list[Rendered], sampling: Sampling) -> Generator[list[int] | str]:
        """Tokens of each answer, or what vLLM said of it, in the order of the prompts."""
        if not asked:
            return
        import ray

        with _hushed():
            dataset = self._dataset(asked, sampling)
            rows = iter(dataset.iter_rows())
        count = 0
        try:
            with _hushed():
                row = next(rows, None)
            while row is not None:
                if row["at"] != count:
                    raise ServeError(f"Ray Data delivered answer {row['at']} where {count} was next", ["ask again"])
                yield row.get("__inference_error__") or list(row["generated_tokens"])
                count += 1
                row = next(rows, None)
        except ray.exceptions.RayError as error:
            raise _failed(error) from error
        if count != len(asked):
            raise ServeError(f"vLLM gave {count} answers to {len(asked)} prompts", ["ask again: what is done is kept"])

    def _dataset(self, asked: list[Rendered], sampling: Sampling) -> Any:
        """Ray Data's plan: the prompts through the engines, nothing run yet."""
        import ray.data
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        _quiet()
        plan, blocks = self._plan, -(-len(asked) // self._batch_size)
        engines = min(plan.engines, blocks)
        bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if plan.gpus else {"CPU": plan.cpus}
        config = vLLMEngineProcessorConfig(
            model_source=self._folder,
            engine_kwargs=dict(plan.kwargs),
            runtime_env={"env_vars": plan.env},
            batch_size=self._batch_size,
            # Of one engine: enough batches that it is full while the last answers of one are still being made.
            max_concurrent_batches=max(2, -(-2 * plan.kwargs["max_num_seqs"] // self._batch_size)),
            concurrency=(engines, engines),
            placement_group_config={"bundle_per_worker": bundle, "strategy": "STRICT_PACK"},
            should_continue_on_error=True,
            log_engine_metrics=False,
            # Prompts come as tokens and leave as tokens: text is made of them as for every other engine.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        )
        sampled: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": sorted(self._what.encoder.stops),
            "detokenize": False,
        }
        if sampling.seed is not None:
            sampled["seed"] = sampling.seed

        def ask(row: dict[str, Any]) -> dict[str, Any]:
            return {"tokenized_prompt": row["ids"], "sampling_params": {**sampled, "max_tokens": int(row["room"])}}

        def tell(row: dict[str, Any]) -> dict[str, Any]:
            return {"at": row["at"], "generated_tokens": list(row["generated_tokens"])}

        processor = build_processor(
            config,
            preprocess=ask,
            postprocess=tell,
            # They only move columns about; a whole CPU each might not be there beside the engine's.
            preprocess_map_kwargs={"num_cpus": 0.1},
            postprocess_map_kwargs={"num_cpus": 0.1},
        )
        rows = [{"at": at, "ids": one.ids, "room": one.room} for at, one in enumerate(asked)]
        dataset = processor(ray.data.from_items(rows, override_num_blocks=blocks))
        dataset.context.execution_options.preserve_order = True
        return dataset

    def close(self) -> None:
        """Nothing: the engines end with the last answer of each part."""


def _answer(what: Found, asked: Rendered, generated: list[int] | str) -> Answer:
    if isinstance(generated, str):
        return Answer.failed(generated, len(asked.ids))
    return what.encoder.answer(asked, generated)


def _failed(error: Exception) -> ServeError:
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    return ServeError(
        f"vLLM did not answer: {cause(str(error), logs)[0][:300]}",
        [f"the whole log is in {logs}", "answer with --engine transformers"],
    )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Starting engines fills the terminal with lines that no setting of Ray or vLLM withholds: C++ writes some of them.

    They go to a file beside Ray's own logs. Short: while the first answer is waited for, and nothing else is said.
    """
    import ray

    logs = ray._private.worker._global_node.get_logs_dir_path()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported, also in this process
    with open(os.path.join(logs, "ray_ft-offline.err"), "a", encoding="utf-8") as file:
        sys.stderr.flush()
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stderr(file):  # what is no longer file 2, such as a notebook's
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _quiet() -> None:
    """Ray Data draws nothing and says nothing, also where the connection is the caller's own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.llm"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ------------------------------------------------------------------------------------------------------------ where


def on_every_node(source: str, gpus: bool) -> str:
    """The local folder of a model, fetched to every node that may answer.

    Raises:
        ModelError: a node does not have it, or has it at another place.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = local_folder(source)
    own = ray.get_runtime_context().get_node_id()
    others = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and (node["Resources"].get("GPU", 0) >= 1 or not gpus)
    ]
    look = ray.remote(num_cpus=0)(_look)  # also where all CPUs of a node are taken, or it has none
    found = ray.get(
        [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote(source) for n in others]
    )
    if other := [(host, folder) for host, folder in found if folder != here]:
        host, folder = other[0]
        raise ModelError(
            f"node {host} has the model at {folder or 'no place'}, this one at {here}",
            ["use storage that all nodes share, or a URI (s3://…, gs://…) with the same RAY_FT_CACHE on every node"],
        )
    return here


def _look(source: str) -> tuple[str, str | None]:
    try:
        return socket.gethostname(), local_folder(source)
    except ModelError:
        return socket.gethostname(), None


def _node() -> tuple[int, int]:
    """(CPUs, bytes of memory) of the largest node: one engine runs there. Where no node has CPUs, one is brought up."""
    import ray

    if not ray.cluster_resources().get("CPU", 0):
        ray.get(ray.remote(num_cpus=placement.answering_cpus())(os.getpid).remote())
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    best = max(nodes, key=lambda node: (node.get("CPU", 0), node.get("memory", 0)))
    cpus = int(best.get("CPU", 1))
    if len(nodes) == 1:  # Ray's count may exceed the cores; threads beyond the cores slow each other down
        cpus = min(cpus, len(os.sched_getaffinity(0)))
    else:
        cpus -= 1  # the tasks that bring prompts need one too
    return max(cpus, 1), int(best.get("memory", 8 << 30))


def _gpu_bytes() -> int:
    """Memory of a GPU of the cluster, asked there: its nodes may be of a kind that this process has none of."""
    import ray

    return int(ray.get(ray.remote(num_gpus=1, num_cpus=0)(_memory).remote()))


def _memory() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
