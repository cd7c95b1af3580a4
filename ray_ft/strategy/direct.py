"""Strategies whose optimizer works on the module's own parameters, after the backward pass or within it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import nn

from ray_ft.span import Span
from ray_ft.strategy import state
from ray_ft.strategy.base import Layout, Piece, Strategy, Updater
from ray_ft.strategy.in_backward import InBackward


class Direct(Strategy):
    """What FSDP and Replicated share.

    Args:
        in_backward: update each parameter as soon as its gradient is there.
    """

    def __init__(self, layout: Layout, in_backward: bool = False) -> None:
        super().__init__(layout)
        self._in_backward: InBackward | None = None
        self._wants_in_backward = in_backward

    def _make_optimizers(self, make: Updater) -> None:
        """To be called once the parameters are laid out and filled."""
        self._names = {parameter: name for name, parameter in self.named_parameters()}
        if self._wants_in_backward:
            self._in_backward = InBackward(self._trained(), make, self._pieces, self._reduce_squares, self._reduce)
            self._optimizers = self._in_backward.optimizers
        else:
            self._optimizers = [make(self._trained(), self._pieces)]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    @abstractmethod
    def _span(self, parameter: torch.Tensor) -> Span:
        """This worker's run of a parameter."""

    def _group(self, parameter: torch.Tensor) -> torch.distributed.ProcessGroup | None:
        """Workers that hold a parameter's other runs."""
        return None

    def _reduce(self, gradient: torch.Tensor) -> None:
        """Complete a gradient that arrives within the backward pass, in place."""

    @abstractmethod
    def _reduce_squares(self, total: torch.Tensor) -> torch.Tensor:
        """This worker's sum of squared gradients to that of all workers."""

    @abstractmethod
    def _complete(self) -> list[torch.Tensor]:
        """Complete the sum of gradients over workers. Returns the parameters that have one."""

    def _pieces(self, tensor: torch.Tensor) -> Iterator[Piece]:
        yield Piece(self._names[tensor], 0, self._span(tensor), self._group(tensor))

    def spans(self) -> dict[str, Span]:
        return {name: self._span(parameter) for name, parameter in self.named_parameters()}

    def moments(self) -> dict[str, dict[str, Span]]:
        found: dict[str, dict[str, Span]] = {}
        for optimizer in self._optimizers:
            found |= state.moments(optimizer, self._pieces, self.layout.rank == 0)
        return found

    def restored(self) -> None:
        for optimizer in self._optimizers:
            state.restored(optimizer)

    def begin(self, lr: float) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self, clip_norm: float | None) -> torch.Tensor:
        if self._in_backward is not None:
            return self._in_backward.norm()
        parameters = self._complete()
        norm = self._clip(parameters, clip_norm)
        if torch.isfinite(norm):
            for optimizer in self._optimizers:
                optimizer.step()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self, parameters: list[torch.Tensor], largest: float | None) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, whose norm of bfloat16 gradients has bfloat16's three digits."""
        gradients = [state.local(p.grad) for p in parameters if p.grad is not None]
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients]).sum()
        norm = self._reduce_squares(squares).sqrt()
        if largest is not None:
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm
