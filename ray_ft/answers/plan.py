"""How vLLM answers many prompts: engines, GPUs of each, cache and context, from a model's size and what there is.

Pure arithmetic. Limits: one kind of GPU, one engine's GPUs on one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ft.answers.found import Found
from ray_ft.errors import ModelError, ResourceError
from ray_ft.model import load
from ray_ft.vllm_needs import (
    CPU_OVERHEAD,
    GPU_MEMORY_UTILIZATION,
    ITEMSIZE,
    answers_otherwise,
    cannot_load,
    cpu_cache,
    environment,
    kv_bytes_per_token,
    least_cpu_cache,
    smallest_split,
)

#: Requests that one engine works on at once.
MAX_NUM_SEQS = 256
MAX_NUM_SEQS_CPU = 32

QUIET = {"VLLM_LOGGING_LEVEL": "WARNING"}

#: Share of a GPU's memory that weights alone may take when the number of GPUs of one engine is chosen, so that a cache
#: worth having is left.
WEIGHTS_SHARE = 0.70


@dataclass(frozen=True)
class Plan:
    """How vLLM runs: engines at once, GPUs or CPUs of each, its keyword arguments and environment."""

    engines: int
    gpus: int
    cpus: int
    kwargs: dict[str, Any]
    env: dict[str, str]


def plan_gpus(what: Found, gpus: int, gpu_bytes: int) -> Plan:
    """As few GPUs for each engine as hold the model, and as many engines as there are GPUs for.

    Args:
        gpus: GPUs there are.
        gpu_bytes: memory of one.

    Raises:
        ResourceError: the model does not fit.
        ModelError: vLLM would answer as another model.
    """
    _refuse(what, answers_otherwise(what.config.to_dict()))
    weights = _parameters(what) * 2  # bfloat16
    heads = int(what.config.get_text_config().num_attention_heads)
    usable = gpu_bytes * WEIGHTS_SHARE
    split = smallest_split(heads, weights, usable)
    if split is None or split > gpus:
        need = f"{split} of them (tensor parallel) would hold it" if split else "no number of them holds it"
        raise ResourceError(
            f"{what.name} has {weights / 2**30:.1f} GiB of weights in bfloat16, and {gpus} GPU(s) of "
            f"{gpu_bytes / 2**30:.0f} GiB do not hold them with a KV cache: {need}",
            ["use a cluster with more GPUs, or with larger ones"],
        )
    kwargs = {
        "max_model_len": what.context,
        "max_num_seqs": MAX_NUM_SEQS,
        "dtype": "bfloat16",
        "tensor_parallel_size": split,
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
    }
    return Plan(gpus // split, split, 1, kwargs, {**environment(), **QUIET})


def _refuse(what: Found, why: str | None) -> None:
    if why:
        raise ModelError(f"{what.name}: {why}", ["answer with --engine transformers"])


def plan_cpu(what: Found, cpus: int, memory: int) -> Plan:
    """One engine on the CPUs of one node.

    Raises:
        ResourceError: weights and the cache of two prompts of full length do not fit its memory.
        ModelError: vLLM cannot load the model here, or would answer as another model.
    """
    config = what.config.to_dict()
    _refuse(what, cannot_load(config) or answers_otherwise(config))
    dtype = str(load.stored_dtype(what.config)).removeprefix("torch.")
    dtype = dtype if dtype in ("float32", "bfloat16") else "float32"
    item = ITEMSIZE[dtype]
    per_token = kv_bytes_per_token(config, item)
    least = least_cpu_cache(per_token, what.context)
    weights = _parameters(what) * item
    free = memory - weights - CPU_OVERHEAD
    if free < least:
        raise ResourceError(
            f"{what.name} needs {(weights + CPU_OVERHEAD + least) / 2**30:.1f} GiB of memory in vLLM, and the largest "
            f"node has {memory / 2**30:.1f}",
            ["use a node with more memory, or a GPU", "answer with --engine transformers"],
        )
    kwargs = {
        "max_model_len": what.context,
        "max_num_seqs": MAX_NUM_SEQS_CPU,
        "dtype": dtype,
        "enforce_eager": True,  # compiling takes minutes of CPU that a small model never earns back
        "kv_cache_memory_bytes": cpu_cache(per_token, what.context, MAX_NUM_SEQS_CPU, free),
    }
    return Plan(1, 0, cpus, kwargs, {**environment(cpus), **QUIET})


def _parameters(what: Found) -> int:
    stored = sum(path.stat().st_size for path in Path(what.folder).glob("*.safetensors"))
    return stored // load.stored_dtype(what.config).itemsize
