"""The copy of a worker's state in host memory, which a checkpoint is written from while training changes the state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch

from ray_ft.span import Span
from ray_ft.train import shards


class HostCopy:
    """One buffer in host memory, kept from save to save: to allocate it anew costs as much as to fill it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def _pin(self) -> None:
        # Not by `pin_memory=True`: PyTorch's allocator of pinned memory takes the next power of two.
        error = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.numel(), 0)
        self._pinned = int(error) == 0
        if not self._pinned:  # the copy is slower then, and waits
            with contextlib.suppress(RuntimeError):  # PyTorch reports the refusal with its next kernel, and forgets it
                torch.zeros(1, device="cuda")

    def free(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def prepare(self, spans: Mapping[str, Span]) -> Callable[[], dict[str, Span]]:
        """What gives copies of what this worker owns of `spans`, in any thread; the next ones overwrite them."""
        mine = shards.owned(spans)
        size = sum(span.data.nbytes for span in mine.values())
        device = next((span.data.device for span in mine.values() if span.data.is_cuda), None)
        if self._buffer.numel() < size:
            self.free()  # before the new one is there
            self._buffer = torch.empty(size, dtype=torch.uint8)
            if device is not None:
                self._pin()
        side = torch.cuda.Stream(device) if device is not None else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))  # here: what is computed later is not waited for

        def copies() -> dict[str, Span]:
            found, at = {}, 0
            with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
                for name, span in mine.items():
                    data = self._buffer[at : at + span.data.nbytes].view(span.data.dtype)
                    data.copy_(span.data.detach(), non_blocking=side is not None)
                    found[name] = Span(data, span.start, span.shape)
                    at += span.data.nbytes
            if side is not None:
                side.synchronize()
            return found

        return copies
