"""The peers of `checkpoint.py`: how PyTorch saves and loads a dictionary of tensors, by its three ways.

Each function is what a training script calls, and waits for as long as that script does; none flushes to the disk, as
none of them does so by itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

State = dict[str, torch.Tensor]


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one, which asynchronous saving asks for."""
    with tempfile.TemporaryDirectory(prefix="bench_group_") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def torch_save(state: State, folder: str) -> None:
    os.makedirs(folder)
    torch.save(state, os.path.join(folder, "state.pt"))


def torch_load(state: State, folder: str) -> None:
    """Into the tensors there are, as `load_state_dict` of a model and an optimizer does."""
    _copy(torch.load(os.path.join(folder, "state.pt"), weights_only=True), state)


def torch_load_mapped(state: State, folder: str) -> None:
    """The same from a mapped file, so that nothing is copied twice."""
    _copy(torch.load(os.path.join(folder, "state.pt"), weights_only=True, mmap=True), state)


def _copy(loaded: State, state: State) -> None:
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(loaded[name])


def dcp_save(state: State, folder: str) -> None:
    dcp.save(state, checkpoint_id=folder)


def dcp_load(state: State, folder: str) -> None:
    dcp.load(state, checkpoint_id=folder)


class Async:
    """Asynchronous saves in a thread; the copy in host memory is kept from save to save, as ours is."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # Pinned memory is for GPUs, and a shared one for a process that writes.
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager: Any = DefaultStager(options)

    def save(self, state: State, folder: str) -> Callable[[], Any]:
        """Returns what waits until it is written."""
        future: Any = dcp.async_save(state, checkpoint_id=folder, async_stager=self._stager)
        return future.result

    def close(self) -> None:
        self._stager.close()
