"""No sharding: every worker holds the whole model. For one device, for a debugger, and as the reference in tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ray_ft.errors import ModelError
from ray_ft.span import Span
from ray_ft.strategy import allocate
from ray_ft.strategy.base import Updater
from ray_ft.strategy.direct import Direct


class Replicated(Direct):
    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[Mapping[str, Span]], None],
        make_optimizer: Updater,
    ) -> None:
        kept = {p.dtype for p in module.parameters() if p.is_floating_point()}
        if self.layout.dtype == torch.float32 and len(kept) > 1:
            raise ModelError(
                "train.optimizer.weights: bfloat16 beside frozen float32 weights needs a computation in bfloat16",
                ["model.dtype=bfloat16", "train.optimizer.weights=float32", "train.strategy=fsdp"],
            )
        allocate.buffers(module, self.layout.device)
        allocate.OneByOne(module, self.layout.device).allocate()
        self.module = module
        fill(self.spans())
        self._make_optimizers(make_optimizer)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.layout.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.layout.device.type, dtype=self.layout.dtype)

    def _span(self, parameter: torch.Tensor) -> Span:
        return Span.whole(parameter, owner=self.layout.rank == 0)

    def _reduce(self, gradient: torch.Tensor) -> None:
        self.all_reduce(gradient)

    def _reduce_squares(self, total: torch.Tensor) -> torch.Tensor:
        return total  # every worker has the whole gradient

    def _complete(self) -> list[torch.Tensor]:
        parameters = [p for _, p in self._trained()]
        for parameter in parameters:
            if parameter.grad is None:  # a worker whose rows were all padding still takes part in the sum
                parameter.grad = torch.zeros_like(parameter)
            self.all_reduce(parameter.grad)
        return parameters
