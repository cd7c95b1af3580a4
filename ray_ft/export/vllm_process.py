"""The process in which vLLM answers for the gate: started early, asked once, ended with all that it started.

Limits: one node. On GPUs the model is split over as few of them as hold it; on CPU it takes the memory of its weights
and `OVERHEAD`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from ray_ft import paths
from ray_ft.errors import ExportError
from ray_ft.export import lora
from ray_ft.export.reference import TOKENS
from ray_ft.export.tensorfile import folder_entries
from ray_ft.model import load
from ray_ft.trained import Trained
from ray_ft.vllm_needs import (
    CPU_KV_FLOOR,
    GPU_MEMORY_UTILIZATION,
    answers_otherwise,
    cannot_load,
    environment,
    kv_bytes_per_token,
    lora_rank,
)

GIB = 1 << 30
OVERHEAD = 3 * GIB  # of the process beside weights: libraries, activations, the KV cache of a few documents
LIKELIEST = 10  # tokens of each position whose log-probabilities are compared, beside its own
LENGTH = TOKENS + 8  # longest prompt and its one answer
SECONDS = 3600  # for reading a large model from slow storage; afterwards it is taken to hang
LOG_LINES = 12  # of its output that an error quotes
LOG = "export_vllm.log"


def obstacle(trained: Trained) -> str | None:
    """Why vLLM cannot be asked on this machine; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    config = load.load_config(trained.base).to_dict()
    if why := cannot_load(config) or answers_otherwise(config):
        return why
    weights = _bytes(trained)
    if not torch.cuda.is_available() and _built_for_gpus():
        return "vLLM here is built for GPUs, and this machine has none, such as a cluster's head"
    if torch.cuda.is_available():
        return None if _gpus(trained, weights) else f"no number of GPUs here holds {weights / GIB:.1f} GiB of weights"
    free = psutil.virtual_memory().available
    if free < weights + OVERHEAD:
        return f"it needs {(weights + OVERHEAD) / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free"
    return None


def _built_for_gpus() -> bool:
    """Whether the vLLM that is installed cannot run without one; builds for CPUs have another name or version."""
    try:
        return "cpu" not in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return False


class Vllm:
    """One process; `answer` may be called once.

    Attributes:
        trained: whose export it is to load.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self._folder = tempfile.mkdtemp(prefix="ray-ft-vllm-")
        self._result, self._log = os.path.join(self._folder, "result.json"), os.path.join(self._folder, "log")
        self._asked = False
        root = str(Path(__file__).parents[2])
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray_ft.export.vllm_probe"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, so that all it starts can be ended with it
                env={**os.environ, **_environment(root)},
            )

    def __enter__(self) -> Vllm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of its group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        for name in os.listdir(self._folder):
            os.unlink(os.path.join(self._folder, name))
        os.rmdir(self._folder)

    @property
    def asked(self) -> bool:
        return self._asked

    def ask(self, folder: str, documents: list[list[int]]) -> None:
        """Let it load an exported folder and begin to answer."""
        adapter = os.path.join(folder, lora.CONFIG)
        is_adapter = os.path.exists(adapter)
        entries = folder_entries(folder).get(lora.WEIGHTS, {})
        request = {
            "engine": _engine(self.trained, self.trained.base if is_adapter else folder, is_adapter),
            "adapter": folder if is_adapter else None,
            "keys": list(entries),
            "documents": documents,
            "likeliest": LIKELIEST,
            "result": self._result,
        }
        assert self._process.stdin is not None
        self._asked = True
        with contextlib.suppress(BrokenPipeError):  # it has ended; `answer` says why
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()
        self._process.stdin = None

    def answer(self) -> dict[str, Any]:
        """Wait for what `vllm_probe` found.

        Raises:
            ExportError: the process failed, with the end of what it said.
        """
        try:
            status = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise self._failed(f"gave no answer within {SECONDS} s") from None
        if status or not os.path.exists(self._result):
            raise self._failed(f"ended with status {status}")
        with open(self._result, encoding="utf-8") as stream:
            return json.load(stream)

    def _failed(self, how: str) -> ExportError:
        text = Path(self._log).read_text(errors="replace")
        kept = paths.join(self.trained.run.logs, LOG)
        paths.write_text(kept, text)
        lines = [line for line in text.splitlines() if line.strip()][-LOG_LINES:]
        return ExportError(
            "\n".join([f"vLLM {how}:", *(f"    {line[:300]}" for line in lines)]),
            [f"all of its output: {kept}", "export without asking vLLM: --no-vllm"],
        )


def _environment(root: str) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process itself
        **environment(len(os.sched_getaffinity(0))),
        "TORCH_COMPILE_DISABLE": "1",  # compiling what ranks log-probabilities takes 19 s on two cores, and saves 0.1
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # our own function, for the workers of a model split over GPUs
    }


def _bytes(trained: Trained) -> int:
    """Of the whole model as it is exported."""
    config = load.load_config(trained.base)
    dtype = load.stored_dtype(config)
    return sum(p.numel() for p in load.build(config).parameters()) * dtype.itemsize


def _gpus(trained: Trained, weights: int) -> int | None:
    """The least number of GPUs that hold the weights and divide the attention heads."""
    heads = load.load_config(trained.base).get_text_config().num_attention_heads
    free = min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    counts = [n for n in range(1, torch.cuda.device_count() + 1) if heads % n == 0]
    return next((n for n in counts if weights / n + OVERHEAD <= GPU_MEMORY_UTILIZATION * free), None)


def _engine(trained: Trained, model: str, adapter: bool) -> dict[str, Any]:
    """vLLM's keyword arguments."""
    config = load.load_config(trained.base)
    text = config.get_text_config()
    dtype = load.stored_dtype(config)
    settings: dict[str, Any] = {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": min(LENGTH, text.max_position_embeddings),
        "max_num_seqs": 4,
        "enforce_eager": True,
        "enable_prefix_caching": False,  # what is in the cache has no log-probabilities
        "disable_log_stats": True,
    }
    if text is not config:
        settings["language_model_only"] = True  # the documents are text
    if adapter:
        assert trained.recipe.model.adapter is not None
        rank = trained.recipe.model.adapter.rank
        settings |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": lora_rank(rank),
        }
    if torch.cuda.is_available():
        return {
            **settings,
            "tensor_parallel_size": _gpus(trained, _bytes(trained)) or 1,
            "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        }
    each = kv_bytes_per_token(config.to_dict(), dtype.itemsize)
    return {**settings, "kv_cache_memory_bytes": max(8 * LENGTH * each, CPU_KV_FLOOR)}
