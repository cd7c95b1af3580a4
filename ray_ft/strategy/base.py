"""The protocol of a strategy, so that the training loop reads the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NamedParameters = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Layout:
    """Where this worker stands and computes.

    `dtype` is the precision of the computation; trained weights, gradients' sums and optimizer state are float32.
    """

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype


class Strategy(ABC):
    """Owns the module and its optimizer. Life: `setup` → per step {`forward`, `backward`}… `finish` → `update`."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[], None],
        make_optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
    ) -> None:
        """Lay a module on the meta device out over the workers, fill it, and make its optimizer.

        Args:
            blocks: the submodules that are gathered as a unit.
            fill: gives the laid-out module its weights, in place.
        """

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context of forward passes without a backward pass."""
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train()

    @abstractmethod
    def precision(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` (already divided by the number of target tokens of the whole step)."""
        loss.backward()

    @abstractmethod
    def finish(self, clip_norm: float | None) -> torch.Tensor:
        """Complete the sum of gradients over workers and clip it. Returns its global 2-norm before clipping."""

    def update(self, lr: float) -> None:
        """One optimizer step with learning rate `lr`; clears the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all workers, in place."""
        if self.layout.world > 1:
            torch.distributed.all_reduce(values)
        return values
