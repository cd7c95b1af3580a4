"""The device of a part: what it is, its memory, and how one waits for it."""

from __future__ import annotations

import contextlib
import gc
import subprocess
from typing import Any

import torch

GIB = 2**30


def described(device: torch.device) -> dict[str, Any]:
    """`gpu`: name, memory and CUDA version in a line; `limit`: bytes of memory, 0 where there is no GPU."""
    if device.type != "cuda":
        return {"gpu": "no GPU", "limit": 0}
    properties = torch.cuda.get_device_properties(device)
    line = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
    return {"gpu": line, "limit": properties.total_memory}


def driver() -> str:
    """Version of the GPU's driver. In a process of its own: it takes no memory of the GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said[0] if said else "unknown"


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int]:
    """Bytes since `forget_peak`: most in tensors, most that the allocator held; nothing where there is no GPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def give_back(device: torch.device) -> None:
    """Give all memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error of the device nothing can be given back
            torch.cuda.empty_cache()


def is_broken(device: torch.device) -> bool:
    """Whether the device fails whatever it is asked, as after an illegal access: until its process ends."""
    try:
        wait(device)
    except RuntimeError:
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a library says it in words of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
