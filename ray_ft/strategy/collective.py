"""Sums over the workers of a group, wherever the values lie."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the workers of `group`, in place; None stands for this worker alone.

    NCCL sums on GPUs only: values that offloading keeps in host memory go there and come back.
    """
    if group is None or group.size() == 1:
        return values
    if values.device.type == "cpu" and "nccl" in dist.get_backend(group):
        on_gpu = values.to("cuda")
        dist.all_reduce(on_gpu, group=group)
        return values.copy_(on_gpu)
    dist.all_reduce(values, group=group)
    return values
