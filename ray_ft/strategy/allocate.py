"""Memory for a module on the meta device, one tensor after the other, so that each can be cut up before the next."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class OneByOne(nn.Module):
    """Stands for a module on the meta device; each of its parameters is allocated when it is asked for.

    Tied parameters stay tied, which `to_empty` forgets. Their values are arbitrary.

    Args:
        dtype: of trained parameters; None: each keeps its own, as frozen ones do.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._stands_for = (module,)  # in a tuple: not a submodule
        self._device, self._dtype = device, dtype

    def allocate(self) -> None:
        """Allocate all parameters, for a module that is not cut up."""
        for _ in self.parameters():
            pass  # asking for it is what allocates it

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for part in self._stands_for[0].modules():
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(parameter, []).append((part, name))
        for parameter, at in places.items():
            dtype = self._dtype if self._dtype and parameter.requires_grad else parameter.dtype
            data = torch.empty(parameter.shape, dtype=dtype, device=self._device)
            new = nn.Parameter(data, parameter.requires_grad)
            del data
            for part, name in at:
                setattr(part, name, new)
            yield new


def buffers(module: nn.Module, device: torch.device) -> None:
    """Allocate a meta module's buffers, in their own precision; whoever fills the module computes them."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device=device))
