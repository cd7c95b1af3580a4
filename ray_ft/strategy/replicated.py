"""No sharding: every worker holds the whole model. For one device, for a debugger, and as the reference in tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ray_ft.strategy.base import NamedParameters, Strategy


class Replicated(Strategy):
    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[], None],
        make_optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
    ) -> None:
        module.to_empty(device=self.layout.device)
        fill()
        self.module = module
        self.optimizer = make_optimizer(module.named_parameters())

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.layout.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.layout.device.type, dtype=self.layout.dtype)

    def finish(self, clip_norm: float | None) -> torch.Tensor:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:  # a worker whose rows were all padding still takes part in the sum
                parameter.grad = torch.zeros_like(parameter)
            self.all_reduce(parameter.grad)
        return torch.nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm is not None else float("inf"))
