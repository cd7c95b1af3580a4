"""The protocol of a strategy, so that the training loop reads the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ray_ft.span import Span

#: Of the outermost module, which computes the loss: parameters are named as in the Hugging Face model inside it.
PREFIX = "model."


@dataclass(frozen=True)
class Layout:
    """Where this worker stands and computes.

    `dtype` is the precision of the computation. `nodes` is the number of machines, each with world ÷ nodes workers of
    consecutive ranks.
    """

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    nodes: int = 1


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + span.data.numel()) of an optimizer's tensor: a run of a named parameter.

    `span.data` is the view of the optimizer's tensor; `group` the workers that hold the parameter's other runs, None
    where there are none.
    """

    name: str
    offset: int
    span: Span
    group: torch.distributed.ProcessGroup | None


class Updater(Protocol):
    """Makes the optimizer over (name, parameter) pairs; `pieces` tells which named runs one of its tensors consists of.

    A strategy may give the optimizer other tensors than the model's parameters: `pieces` is asked when it steps.
    """

    def __call__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], pieces: Callable[[torch.Tensor], Iterable[Piece]]
    ) -> torch.optim.Optimizer: ...


class Strategy(ABC):
    """Owns the module and its optimizer. Life: `setup` → per step `begin` {`forward`, `backward`}… `step`."""

    module: nn.Module

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[Mapping[str, Span]], None],
        make_optimizer: Updater,
    ) -> None:
        """Lay a module on the meta device out over the workers, fill it, and make its optimizer.

        Parameters are already in the precision in which they are to be kept; all that is not trained has
        ``requires_grad`` False.

        Args:
            blocks: the submodules that are gathered as a unit.
            fill: gives the laid-out module its weights, in place; called with `spans`.
        """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that they have in the Hugging Face model; tied ones once."""
        for name, parameter in self.module.named_parameters():
            yield name.removeprefix(PREFIX), parameter

    @abstractmethod
    def spans(self) -> dict[str, Span]:
        """What this worker holds of each parameter (see `named_parameters`); of trained ones in full precision."""

    @abstractmethod
    def moments(self) -> dict[str, dict[str, Span]]:
        """What this worker holds of the optimizer's state, by trained parameter and the state's name.

        Created where no step has created it yet. To be called between steps.
        """

    @abstractmethod
    def restored(self) -> None:
        """To be called after the data of `spans` or `moments` have been changed: brings copies of them up to date."""

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

    @abstractmethod
    def begin(self, lr: float) -> None:
        """Start a step whose update is made with learning rate `lr`."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss` (already divided by the number of target tokens of the whole step).

        Args:
            last: whether this is the step's last backward pass.
        """
        loss.backward()

    @abstractmethod
    def step(self, clip_norm: float | None) -> torch.Tensor:
        """Complete the sum of gradients over workers, clip it, update the parameters and clear the gradients.

        Where the norm is not finite nothing is updated (unless the optimizer works within the backward pass).

        Returns:
            The gradient's global 2-norm before clipping, a scalar.
        """

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all workers, in place."""
        if self.layout.world > 1:
            torch.distributed.all_reduce(values)
        return values
