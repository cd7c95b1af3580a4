"""What vLLM has to be told, and how much it takes: for serving, for offline answers and for the export's gate.

Pure arithmetic on a model's ``config.json``; loads nothing. Sizes in bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

#: Share of each GPU's memory that vLLM may fill with weights, activations and KV cache.
GPU_MEMORY_UTILIZATION = 0.90

#: Memory on CPU beside weights and KV cache: the engine's processes and their libraries.
CPU_OVERHEAD = 2 << 30

#: Below this a KV cache on CPU is not worth shrinking.
CPU_KV_FLOOR = 256 << 20

#: Bytes of one element, by the name of the type.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

#: Model types whose images vLLM can do without torchvision, see `ray_ft.vllm_plugin`.
SEEN_BY_PIL = ("gemma3",)

#: Ranks that vLLM makes room for (`vllm.config.lora.MaxLoRARanks`); an adapter of another is padded up to the next.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def cannot_load(hf_config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot load the model in this environment; None: it can. That of GPU machines comes with both."""
    kind = hf_config.get("model_type")
    # Images of some models are read by PIL for it (`vllm_plugin`).
    if "text_config" in hf_config and kind not in SEEN_BY_PIL and importlib.util.find_spec("torchvision") is None:
        return "vLLM loads models with parts beside the text model by torchvision, which is not installed"
    if kind == "gemma3n" and importlib.util.find_spec("timm") is None:
        return "vLLM loads Gemma 3n's vision tower by timm, which is not installed"
    return None


def answers_otherwise(hf_config: Mapping[str, Any]) -> str | None:
    """Why vLLM (0.32) would answer as another model; None: it would not."""
    if hf_config.get("model_type") == "gemma3n_text":  # it reads them and never adds them; of the whole model it does
        return "vLLM leaves the embeddings of each layer out of a Gemma 3n without towers: it answers as another model"
    return None


def kv_bytes_per_token(hf_config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of KV cache that one token takes over all layers: 2 (key, value) × layers × KV heads × head size × item.

    An upper bound where layers slide over a window, which keep only that many tokens.
    """
    text = hf_config.get("text_config", hf_config)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return 2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * head_dim * itemsize


def least_cpu_cache(per_token: int, length: int) -> int:
    """The smallest KV cache on CPU: two sequences of `length` tokens (blocks are padded)."""
    return max(2 * length * per_token, CPU_KV_FLOOR)


def cpu_cache(per_token: int, length: int, sequences: int, free: int) -> int:
    """KV cache on CPU, where weights leave `free` bytes: as much as all sequences at full length would fill, but no
    more than half of what is free, since other programs live on the node too."""
    return int(max(least_cpu_cache(per_token, length), min(sequences * length * per_token, free // 2)))


def smallest_split(heads: int, need: float, usable: float) -> int | None:
    """The fewest GPUs (tensor parallel) that divide the attention heads and hold `need` bytes, of which each has
    `usable`; None: no number of them does."""
    return next((n for n in range(1, heads + 1) if heads % n == 0 and need <= usable * n), None)


def lora_rank(rank: int) -> int:
    """The rank that vLLM is to make room for; the largest where none is large enough, which vLLM then refuses."""
    return next((room for room in LORA_RANKS if room >= rank), LORA_RANKS[-1])


def environment(threads: int | None = None) -> dict[str, str]:
    """Environment of an engine's processes; `threads`: of one on CPU."""
    common = {
        "HF_HUB_OFFLINE": "1",  # the folder is complete: nothing is to be asked of the hub, nor sent to anyone
        "VLLM_NO_USAGE_STATS": "1",
    }
    if threads is None:
        return common
    return common | {
        # vLLM's default binds every engine of a node to the same cores, less one; threads are to float over all cores
        # instead. Ray would leave OMP at one thread.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait for the next layer are to sleep, not to spin (200 ms by default): the processes that carry
        # requests and tokens need the same cores. Seen on two cores: 1.3 times the tokens at 1 and at 32 requests.
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # one process talks to itself; without this it may listen on every interface
        "VLLM_HOST_IP": "127.0.0.1",
    }
