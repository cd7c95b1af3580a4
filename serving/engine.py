"""From an exported model's manifest and what the cluster offers to the settings of one vLLM engine.

`plan` is pure arithmetic over two small objects and loads no heavy package; `llm_config` writes its result down as
Ray Serve's `LLMConfig`. Limits: a replica within one node, NVIDIA GPUs or CPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_ft.errors import ServeError
from ray_ft.paths import is_uri
from ray_ft.vllm_needs import (
    CPU_KV_FLOOR,
    CPU_OVERHEAD,
    GPU_MEMORY_UTILIZATION,
    ITEMSIZE,
    answers_otherwise,
    cannot_load,
    cpu_cache,
    environment,
    kv_bytes_per_token,
    least_cpu_cache,
    lora_rank,
    smallest_split,
)
from serving.front import LONGEST_SECONDS
from serving.models import Model

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

GIB = 1024**3
MIB = 1024**2

#: Longest context by default: Gemma 3 allows 131,072 tokens, whose KV cache few machines have room for.
DEFAULT_MAX_MODEL_LEN = 8192

#: Adapters that one batch may mix; more than that are swapped in and out of the device.
MAX_LORAS = 8

#: GiB on the card by Ray's accelerator type, for refusing a model that cannot fit before anything is loaded. The larger
#: variant where there are several (Ray reports both A100s as "A100"), so that a model that fits is never refused.
GPU_GIB = {
    "V100": 32, "P100": 16, "T4": 15, "A10G": 22.5, "L4": 22.5, "L40S": 45, "A100": 80, "A100-40G": 40, "A100-80G": 80,
    "H100": 80, "H200": 141, "H20": 96, "B200": 180, "B300": 270, "GB200": 186, "GB300": 279, "RTX-PRO-6000": 96,
}  # fmt: skip

#: Ray knows no replica without a CPU.
UNRESERVED = 0.01

#: Key of `LLMConfig.experimental_configs` under which the replica finds `Plan.stall_seconds`.
STALL = "ray_ft_stall_seconds"

#: NVIDIA's types before Ampere, on which vLLM refuses bfloat16.
NO_BFLOAT16 = {"K80", "P4", "P100", "V100", "T4"}


@dataclass(frozen=True)
class Cluster:
    """What a replica can have. Sizes in bytes.

    Attributes:
        nodes: nodes that can hold a replica.
        node_cpus: CPUs of the smallest of them.
        node_memory: memory of the smallest of them.
        gpus: GPUs of the whole cluster; 0: replicas run on CPU.
        gpu_bytes: memory of the smallest GPU; None where the type is not known.
        gpu_type: Ray's name of that GPU; of one without bfloat16, where there is any.
        private: it is this machine alone, and no node can join.
    """

    nodes: int = 1
    node_cpus: int = 1
    node_memory: int = 8 * GIB
    gpus: int = 0
    gpu_bytes: int | None = None
    gpu_type: str | None = None
    private: bool = True

    @classmethod
    def read(cls) -> Cluster:
        """Facts of the Ray cluster that this process is connected to."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        with_gpu = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
        usable = with_gpu or [node for node in alive if node["Resources"].get("CPU", 0) >= 1] or alive
        here = ray.get_runtime_context().get_node_id()

        def cpus(node: dict[str, Any]) -> int:
            count = int(node["Resources"].get("CPU", 1))
            # Ray's count may exceed the cores (it is only bookkeeping); threads beyond the cores slow each other down.
            return min(count, len(os.sched_getaffinity(0))) if node["NodeID"] == here else count

        types = {
            name.removeprefix("accelerator_type:")
            for node in with_gpu
            for name in node["Resources"]
            if name.startswith("accelerator_type:")
        }
        known = [kind for kind in types if kind in GPU_GIB]
        smallest = min(known, key=lambda kind: GPU_GIB[kind]) if known and len(known) == len(types) else None
        return cls(
            nodes=len(usable),
            node_cpus=max(1, min(map(cpus, usable))),
            node_memory=int(min(node["Resources"].get("memory", 8 * GIB) for node in usable)),
            gpus=int(sum(node["Resources"]["GPU"] for node in with_gpu)),
            gpu_bytes=int(GPU_GIB[smallest] * GIB) if smallest else None,
            gpu_type=min(types & NO_BFLOAT16, default=smallest),
            # As `session` starts it: no other machine reaches a node on loopback. Any other may have an autoscaler.
            private=all(node["NodeManagerAddress"] == "127.0.0.1" for node in alive),
        )


@dataclass(frozen=True)
class Plan:
    """All that was decided about one engine's deployment; `engine` are vLLM's own keyword arguments.

    Attributes:
        replicas: (fewest, most) copies; how many there are between them follows the load.
        cpus_per_replica: threads of one replica on CPU.
        cpus_reserved: what Ray sets aside for it. Next to nothing on a machine of one's own, where nobody else is to be
            kept away, and a new version has to fit in beside the one that it replaces.
        target_requests: requests under way for which one replica more is worth it.
        stall_seconds: a replica that gives no token for so long, though it has requests, is replaced.
        drain_seconds: how long a replica that is to go may finish what it has begun.
    """

    model: Model
    replicas: tuple[int, int]
    target_requests: int
    max_num_seqs: int
    device: str
    cpus_per_replica: int
    cpus_reserved: float
    gpus_per_replica: int
    stall_seconds: float
    drain_seconds: float
    engine: dict[str, Any]
    env: dict[str, str]


def plan(model: Model, cluster: Cluster) -> Plan:
    """Decide the engine's settings.

    Raises:
        ServeError: the context is longer than the model's, the model cannot fit, the GPUs are too old, or there are too
            few and no more can come; or vLLM cannot load the model here, or would answer with another.
    """
    serve, facts = model.serve, model.facts
    if why := answers_otherwise(model.hf_config):
        raise ServeError(
            f"{model.folder}: {why}",
            ["ask it through transformers: ray-ft chat", "train and serve the whole model, google/gemma-3n-E4B-it"],
        )
    low, high = serve["replicas"] if isinstance(serve["replicas"], list | tuple) else (serve["replicas"],) * 2
    sequences = serve["max_num_seqs"]
    limit = facts["max_position_embeddings"]
    length = serve["max_model_len"] or min(limit, DEFAULT_MAX_MODEL_LEN)
    if length > limit:
        raise ServeError(
            f"serve.max_model_len = {length} is longer than the {limit} positions that the model has",
            [f"set serve.max_model_len to at most {limit}", "leave it out: the model's limit, at most 8192"],
        )
    env = {
        **environment(),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host could send the engine to one that is not
    }
    gateway = serve["gateway"]
    engine: dict[str, Any] = {"max_model_len": length}
    shared: dict[str, Any] = {
        "model": model,
        "replicas": (low, high),
        "target_requests": serve["target_requests"] or max(sequences // 2, 1),
        "max_num_seqs": sequences,
        "stall_seconds": gateway["stall_seconds"],
        # The last request that a place takes, and all that it may take (serving/front.py).
        "drain_seconds": gateway["timeout_seconds"] + LONGEST_SECONDS,
        "engine": engine,
        "env": env,
    }

    def reserved(threads: int) -> float:
        return UNRESERVED if cluster.private else threads

    if model.classifies:
        gpu = cluster.gpus > 0
        threads = max(1, cluster.node_cpus // math.ceil(high / cluster.nodes))
        env["OMP_NUM_THREADS"] = str(threads)
        device: dict[str, Any] = {"device": "gpu" if gpu else "cpu", "gpus_per_replica": int(gpu)}
        cpus = 1 if gpu else threads
        return Plan(cpus_per_replica=cpus, cpus_reserved=reserved(cpus), **device, **shared)
    engine |= {
        "max_num_seqs": sequences,
        "enable_prefix_caching": True,
        "seed": 0,
        # What comes with a request is the gateway's to refuse; the engine's own list is the second lock.
        "allowed_media_domains": list(serve["gateway"]["media_domains"]) or ["none.invalid"],
    }
    if model.adapters:
        engine |= {
            "enable_lora": True,
            "max_loras": (slots := _lora_slots(len(model.adapters), on_cpu=not cluster.gpus)),
            "max_cpu_loras": max(slots, len(model.adapters)),
            "max_lora_rank": lora_rank(max(each.manifest.model["rank"] for each in model.adapters)),
        }
    if cluster.gpus:
        gpus = _gpus_for(model, cluster, serve["gpus_per_replica"], length)
        _enough_gpus(cluster, max(low, 1), gpus)
        engine |= {
            "dtype": "bfloat16",
            "tensor_parallel_size": gpus,
            "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        }
        return Plan(device="gpu", cpus_per_replica=1, cpus_reserved=reserved(1), gpus_per_replica=gpus, **shared)

    if why := cannot_load(model.hf_config):
        raise ServeError(
            f"{model.folder}: {why}",
            ["serve it where there are GPUs: their lock has it", "install one that was built for CPU torch"],
        )
    per_node = math.ceil(high / cluster.nodes)
    threads = max(1, cluster.node_cpus // per_node)
    engine |= {
        "dtype": facts["dtype"],
        "enforce_eager": True,  # compiling takes minutes of CPU that a small model never earns back
        # An exact size in place of VLLM_CPU_KVCACHE_SPACE, which vLLM keeps as a legacy setting in whole GiB. With it
        # and enforce_eager vLLM also leaves out the warm-up pass that would only measure memory.
        "kv_cache_memory_bytes": _cpu_kv_cache(
            facts, model.hf_config, cluster.node_memory // per_node, length, sequences
        ),
    }
    env |= environment(threads)
    return Plan(device="cpu", cpus_per_replica=threads, cpus_reserved=reserved(threads), gpus_per_replica=0, **shared)


def _lora_slots(adapters: int, *, on_cpu: bool) -> int:
    """Adapters that one batch may mix.

    vLLM 0.32 on CPU takes "no adapter" for the last slot: with all slots taken, a request for the base that shares a
    batch with another is answered by an adapter. One slot more than there are adapters stays empty.
    """
    return adapters + 1 if on_cpu else min(adapters, MAX_LORAS)


def _gpus_for(model: Model, cluster: Cluster, asked: int | None, length: int) -> int:
    """GPUs of one replica: those asked for, checked, else as few as hold the weights and one sequence."""
    if asked is not None:
        _fits_gpus(model.facts, model.hf_config, cluster, asked, length)
        return asked
    heads = model.hf_config.get("text_config", model.hf_config)["num_attention_heads"]
    need = _gpu_need(model.facts, model.hf_config, length)
    usable = cluster.gpu_bytes * GPU_MEMORY_UTILIZATION if cluster.gpu_bytes else need
    fewest = smallest_split(heads, need, usable) or 1  # one is too few then, and the error says how many would do
    _fits_gpus(model.facts, model.hf_config, cluster, fewest, length)
    return fewest


def _gpu_need(facts: Mapping[str, Any], hf_config: Mapping[str, Any], length: int) -> float:
    """Bytes of weights and one sequence in bfloat16."""
    itemsize = ITEMSIZE["bfloat16"]
    return facts["parameters"] * itemsize + length * kv_bytes_per_token(hf_config, itemsize)


def _fits_gpus(
    model: Mapping[str, Any], hf_config: Mapping[str, Any], cluster: Cluster, gpus: int, length: int
) -> None:
    """Refuse what certainly cannot work: GPUs without bfloat16, heads that do not divide, or too little memory.

    Too little is less than the weights and one sequence need.
    """
    if cluster.gpu_type in NO_BFLOAT16:
        raise ServeError(
            f"the cluster's {cluster.gpu_type} GPUs cannot compute in bfloat16, "
            "and in float16 Gemma's activations overflow",
            ["use GPUs of the Ampere generation or later (A10G, A100, L4, H100, …), and no older ones beside them"],
        )
    heads = hf_config.get("text_config", hf_config)["num_attention_heads"]
    if heads % gpus:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        near = sorted(divisors, key=lambda n: abs(n - gpus))[:2]
        raise ServeError(
            f"serve.gpus_per_replica = {gpus} does not divide the model's {heads} attention heads",
            [f"set serve.gpus_per_replica to {' or '.join(map(str, sorted(near)))}"],
        )
    if cluster.gpu_bytes is None:
        return
    usable = cluster.gpu_bytes * GPU_MEMORY_UTILIZATION
    weights = model["parameters"] * ITEMSIZE["bfloat16"]
    need = _gpu_need(model, hf_config, length)
    if need <= usable * gpus:
        return
    enough = smallest_split(heads, need, usable)
    ways = [f"set serve.gpus_per_replica to {enough}"] if enough else []
    if enough and enough > cluster.gpus:
        ways[0] += f" (the cluster now has {cluster.gpus} GPUs)"
    if weights < usable * gpus:
        ways.append(f"set serve.max_model_len below {length}")
    raise ServeError(
        f"serve.gpus_per_replica = {gpus}: the model needs {need / GIB:.1f} GiB in bfloat16 with one sequence of "
        f"{length} tokens, and {gpus} × {cluster.gpu_type} gives {usable * gpus / GIB:.1f} GiB "
        f"({GPU_MEMORY_UTILIZATION:.0%} of the memory)",
        [*ways, "use GPUs with more memory"],
    )


def _enough_gpus(cluster: Cluster, replicas: int, gpus: int) -> None:
    """Refuse to wait for ever for GPUs that cannot come; on a shared cluster an autoscaler may add them."""
    if not cluster.private or replicas * gpus <= cluster.gpus:
        return
    most = cluster.gpus // gpus
    raise ServeError(
        f"serve.replicas = {replicas} × serve.gpus_per_replica = {gpus} need {replicas * gpus} GPUs; "
        f"this machine has {cluster.gpus}",
        [
            *([f"set serve.replicas to at most {most}"] if most else []),
            *(["lower serve.gpus_per_replica"] if gpus > 1 else []),
            "serve on a cluster with more GPUs: set RAY_ADDRESS",
        ],
    )


def _cpu_kv_cache(
    model: Mapping[str, Any], hf_config: Mapping[str, Any], memory: int, length: int, sequences: int
) -> int:
    """Bytes of KV cache for a replica that may use `memory` bytes in all."""
    itemsize = ITEMSIZE[model["dtype"]]
    per_token = kv_bytes_per_token(hf_config, itemsize)
    least = least_cpu_cache(per_token, length)
    free = memory - model["parameters"] * itemsize - CPU_OVERHEAD
    if free < least:
        shorter = int(free // (2 * per_token))
        ways = [f"set serve.max_model_len to at most {shorter}"] if shorter >= 8 and free > CPU_KV_FLOOR else []
        raise ServeError(
            f"one replica can have {memory / GIB:.1f} GiB of memory, but needs {(memory - free + least) / GIB:.1f}: "
            f"{model['parameters'] * itemsize / GIB:.1f} for the weights in {model['dtype']}, {CPU_OVERHEAD / GIB:.1f} "
            f"for its processes and {least / GIB:.1f} of KV cache for serve.max_model_len = {length}",
            [*ways, "lower serve.replicas", "use nodes with more memory, or a GPU"],
        )
    return cpu_cache(per_token, length, sequences, free)


def llm_config(plan: Plan) -> LLMConfig:
    """Write a plan down as Ray Serve's `LLMConfig`."""
    from ray.serve.llm import LLMConfig

    gpu, model = plan.device == "gpu", plan.model
    bundle: dict[str, float] = {"GPU": 1} if gpu else {"CPU": plan.cpus_reserved}
    return LLMConfig(
        # A URI is fetched by the replica (see serving/replica.py). Named here, Ray would mirror it through its own
        # cloud client, which knows fewer protocols than `paths`.
        model_loading_config={"model_id": model.name, "model_source": None if is_uri(model.folder) else model.folder},
        callback_config={
            "callback_class": "serving.replica.Folders",
            "callback_kwargs": {
                "folder": model.folder,
                "files": model.own.manifest.content["files"] if model.own else {},
                "adapters": [
                    {"name": each.name, "folder": each.manifest.folder, "files": each.manifest.content["files"]}
                    for each in model.adapters
                ],
            },
        },
        accelerator_config={"kind": plan.device},
        # Tensor parallelism speaks in every layer and the weights are fetched to one node: keep a replica on one node.
        placement_group_config={"bundle_per_worker": bundle, "strategy": "STRICT_PACK"},
        engine_kwargs=plan.engine,
        server_cls="serving.replica.Server",
        runtime_env={"env_vars": dict(plan.env)},
        # On CPU the bundle already counts the threads. On GPU the actor (HTTP, tokenizer) has a CPU of its own.
        deployment_config={**serve_options(plan), "ray_actor_options": {"num_cpus": plan.cpus_reserved if gpu else 0}},
        # Tokens leave as they are made; Ray collects them for 50 ms by default. (They go past Ray: serving/front.py.)
        experimental_configs={"stream_batching_interval_ms": 0, STALL: plan.stall_seconds},
        log_engine_metrics=True,
    )


def serve_options(plan: Plan) -> dict[str, Any]:
    """Ray Serve's options of a deployment: how many replicas, and how they come and go."""
    low, high = plan.replicas
    scale: dict[str, Any] = {"num_replicas": high}
    if low != high:
        scale = {
            "num_replicas": None,
            "autoscaling_config": {
                "min_replicas": low,
                "initial_replicas": max(low, 1),  # a model that does not load is to be known now, not when asked for
                "max_replicas": high,
                "target_ongoing_requests": plan.target_requests,
            },
        }
    return {
        **scale,
        # Equal to the engine's own, so that a request waits in Serve, which can give it to another replica.
        "max_ongoing_requests": plan.max_num_seqs,
        # A model that fails to load fails the same way again, after as many minutes.
        "max_constructor_retry_count": 1,
        # The default is 10 s; a replica that prefills long prompts on CPU answers later than that.
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": plan.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
