"""Counts the memory of tensors while a function runs, real ones or fake."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that come into being while it is active, and of those the ones still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # without complete gradients
        self._gradients = 0
        self._peak = self._peak_held = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._complete: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor that was there before."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = weakref.ref(storage)

    def complete(self, parameter: torch.Tensor) -> None:
        """Count a parameter's gradient apart from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self._complete:
            self._complete.add(storage._cdata)
            self.live -= storage.nbytes()
            self._gradients += storage.nbytes()

    def take_peak(self) -> tuple[int, int]:
        """The most since the last call, without and with complete gradients."""
        found = self._peak, self._peak_held
        self._peak, self._peak_held = self.live, self.live + self._gradients
        return found

    @property
    def gradients(self) -> int:
        return self._gradients

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.live += size
        self._peak = max(self._peak, self.live)
        self._peak_held = max(self._peak_held, self.live + self._gradients)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        if key in self._complete:
            self._complete.discard(key)
            self._gradients -= size
        else:
            self.live -= size
