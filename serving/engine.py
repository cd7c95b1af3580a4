"""From an exported model's manifest and what the cluster offers to the settings of one vLLM engine.

`plan` is pure arithmetic over three small objects and loads no heavy package; `llm_config` writes its result down as
Ray Serve's `LLMConfig`. Limits: one model per application, no adapters, a replica within one node, NVIDIA GPUs or CPUs.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_ft.errors import ServeError
from ray_ft.paths import Manifest, is_uri

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

GIB = 1024**3
MIB = 1024**2

#: Longest context by default: Gemma 3 allows 131,072 tokens, whose KV cache few machines have room for.
DEFAULT_MAX_MODEL_LEN = 8192

#: Share of each GPU's memory that vLLM may fill with weights, activations and KV cache.
GPU_MEMORY_UTILIZATION = 0.90

#: Memory of one replica on CPU beside weights and KV cache: its actor, the engine and the worker process.
CPU_OVERHEAD = 2 * GIB

#: Below this a KV cache is not worth shrinking, in bytes.
CPU_KV_FLOOR = 256 * MIB

#: Bytes of one element, by the name of the type.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

#: GiB on the card by Ray's accelerator type, for refusing a model that cannot fit before anything is loaded. The larger
#: variant where there are several (Ray reports both A100s as "A100"), so that a model that fits is never refused.
GPU_GIB = {
    "V100": 32, "P100": 16, "T4": 15, "A10G": 22.5, "L4": 22.5, "L40S": 45, "A100": 80, "A100-40G": 40, "A100-80G": 80,
    "H100": 80, "H200": 141, "H20": 96, "B200": 180, "B300": 270, "GB200": 186, "GB300": 279, "RTX-PRO-6000": 96,
}  # fmt: skip

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
    """All that was decided about one deployment; `engine` are vLLM's own keyword arguments."""

    model_name: str
    folder: str
    replicas: int
    max_num_seqs: int
    device: str
    cpus_per_replica: int
    gpus_per_replica: int
    engine: dict[str, Any]
    env: dict[str, str]


def kv_bytes_per_token(hf_config: dict[str, Any], itemsize: int) -> int:
    """Bytes of KV cache that one token takes over all layers: 2 (key, value) × layers × KV heads × head size × item.

    An upper bound where layers slide over a window, which keep only that many tokens.
    """
    text = hf_config.get("text_config", hf_config)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * head_dim * itemsize


def plan(
    manifest: Manifest,
    hf_config: dict[str, Any],
    cluster: Cluster,
    *,
    model_name: str | None = None,
    replicas: int | None = None,
    max_model_len: int | None = None,
) -> Plan:
    """Decide the engine's settings.

    Args:
        manifest: the exported model.
        hf_config: its ``config.json``.
        cluster: what there is to run it on.
        model_name: replaces the manifest's ``serve.model_name``; clients ask for the model by it.
        replicas: replaces ``serve.replicas``.
        max_model_len: replaces ``serve.max_model_len``, in tokens.

    Raises:
        ServeError: the name cannot be used, the context is longer than the model's, the model cannot fit, the GPUs are
            too old, or there are too few and no more can come.
    """
    serve, model = manifest.serve, manifest.model
    name = model_name or serve["model_name"] or manifest.run
    if ":" in name:
        raise ServeError(
            f"serve.model_name {name!r} has a ':', which Ray Serve reads as the name of an adapter",
            ["choose a name without ':' through serve.model_name or --model-name"],
        )
    replicas = replicas or serve["replicas"]
    limit = model["max_position_embeddings"]
    length = max_model_len or serve["max_model_len"] or min(limit, DEFAULT_MAX_MODEL_LEN)
    if length > limit:
        raise ServeError(
            f"serve.max_model_len = {length} is longer than the {limit} positions that the model has",
            [f"set serve.max_model_len to at most {limit}", "leave it out: the model's limit, at most 8192"],
        )
    engine: dict[str, Any] = {"max_model_len": length, "max_num_seqs": serve["max_num_seqs"]}
    env = {
        "HF_HUB_OFFLINE": "1",  # the folder is complete: nothing is to be asked of the hub, nor sent to anyone
        "VLLM_NO_USAGE_STATS": "1",
    }
    if cluster.gpus:
        gpus = serve["gpus_per_replica"]
        _fits_gpus(model, hf_config, cluster, gpus, length)
        _enough_gpus(cluster, replicas, gpus)
        engine |= {
            "dtype": "bfloat16",
            "tensor_parallel_size": gpus,
            "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        }
        return Plan(name, manifest.folder, replicas, serve["max_num_seqs"], "gpu", 1, gpus, engine, env)

    per_node = math.ceil(replicas / cluster.nodes)
    threads = max(1, cluster.node_cpus // per_node)
    engine |= {
        "dtype": model["dtype"],
        "enforce_eager": True,  # compiling takes minutes of CPU that a small model never earns back
        # An exact size in place of VLLM_CPU_KVCACHE_SPACE, which vLLM keeps as a legacy setting in whole GiB. With it
        # and enforce_eager vLLM also leaves out the warm-up pass that would only measure memory.
        "kv_cache_memory_bytes": _cpu_kv_cache(
            model, hf_config, cluster.node_memory // per_node, length, serve["max_num_seqs"]
        ),
    }
    env |= {
        # vLLM's default binds every replica of a node to the same cores, less one; the threads that Ray reserved
        # for this replica are to float over all cores instead. Ray itself would leave OMP at one thread.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",  # one process talks to itself; without this it may listen on every interface
        "VLLM_HOST_IP": "127.0.0.1",
    }
    return Plan(name, manifest.folder, replicas, serve["max_num_seqs"], "cpu", threads, 0, engine, env)


def _fits_gpus(model: dict[str, Any], hf_config: dict[str, Any], cluster: Cluster, gpus: int, length: int) -> None:
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
    need = weights + length * kv_bytes_per_token(hf_config, ITEMSIZE["bfloat16"])
    if need <= usable * gpus:
        return
    enough = next((n for n in range(gpus + 1, heads + 1) if heads % n == 0 and need <= usable * n), None)
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


def _cpu_kv_cache(model: dict[str, Any], hf_config: dict[str, Any], memory: int, length: int, sequences: int) -> int:
    """Bytes of KV cache for a replica that may use `memory` bytes in all.

    As much as all sequences at full length would fill, but no more than half of what the weights leave, since other
    programs live on the node too; never less than two sequences at full length (blocks are padded).
    """
    itemsize = ITEMSIZE[model["dtype"]]
    per_token = kv_bytes_per_token(hf_config, itemsize)
    least = max(2 * length * per_token, CPU_KV_FLOOR)
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
    return int(max(least, min(sequences * length * per_token, free // 2)))


def llm_config(plan: Plan) -> LLMConfig:
    """Write a plan down as Ray Serve's `LLMConfig`."""
    from ray.serve.llm import LLMConfig

    gpu = plan.device == "gpu"
    bundle: dict[str, float] = {"GPU": 1} if gpu else {"CPU": plan.cpus_per_replica}
    return LLMConfig(
        # A URI is fetched by the replica (see serving/replica.py). Named here, Ray would mirror it through its own
        # cloud client, which knows fewer protocols than `paths`.
        model_loading_config={
            "model_id": plan.model_name,
            "model_source": None if is_uri(plan.folder) else plan.folder,
        },
        callback_config={
            "callback_class": "serving.replica.LocalFolder",
            "callback_kwargs": {"folder": plan.folder},
        },
        accelerator_config={"kind": plan.device},
        # Tensor parallelism speaks in every layer and the weights are fetched to one node: keep a replica on one node.
        placement_group_config={"bundle_per_worker": bundle, "strategy": "STRICT_PACK"},
        engine_kwargs=plan.engine,
        server_cls="serving.replica.Server",
        runtime_env={"env_vars": dict(plan.env)},
        deployment_config={
            "num_replicas": plan.replicas,
            # Equal, so that a request waits in Serve, which can give it to another replica, and never inside vLLM.
            "max_ongoing_requests": plan.max_num_seqs,
            # On CPU the bundle already counts the threads. On GPU the actor (HTTP, tokenizer) has a CPU of its own.
            "ray_actor_options": {"num_cpus": 1 if gpu else 0},
            # A model that fails to load fails the same way again, after as many minutes.
            "max_constructor_retry_count": 1,
            # The default is 10 s; a replica that prefills long prompts on CPU answers later than that.
            "health_check_timeout_s": 60,
            "graceful_shutdown_timeout_s": 10,
        },
        # Tokens leave as they are made; Ray collects them for 50 ms by default.
        experimental_configs={"stream_batching_interval_ms": 0},
    )
