"""Adafactor over parameters that may be cut anywhere (Shazeer & Stern 2018, algorithms 4 and 5).

torch's own scales each step by the parameter's norm, and neither it nor the one in transformers works on pieces of
parameters. Here the statistics are sums over all workers' runs and every worker keeps them whole: a row's and a
column's mean for each row and column of a matrix, which is little, and the same whatever the sharding. A parameter of
three or more dimensions is seen as the matrix [first, all others], a vector has a moment for each element. The learning
rate is given, the decay rate is 1 − t^−0.8, updates are clipped at root-mean-square 1. Limit: every worker of a
parameter's group has to step when one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ray_ft.strategy.base import Piece
from ray_ft.strategy.collective import all_reduce
from ray_ft.train import rounding

BLOCK = 1 << 24  # elements that are converted to float32 at once: a copy of a large embedding would not fit beside it


class Adafactor(torch.optim.Optimizer):
    """State of an optimizer's tensor: "step", and "<parameter>/row" and "<parameter>/column" of each of its pieces, or
    "<parameter>/moment" of a vector; whole, the same on all workers of the parameter.

    Where ``found_inf`` is set (a scalar tensor, as torch's fused optimizers have it) and not zero, weights and moments
    stay as they are, decided without waiting for the device; the step is counted all the same.

    Args:
        groups: parameters, or groups of them with a ``weight_decay`` (decoupled) of their own.
        pieces: the named runs of which one of the tensors consists; asked in each step.
        seed: of the rounding of weights in bfloat16.
        decay: exponent of the decay rate.
        eps: added to squared gradients.
        clip: root-mean-square that an update is scaled down to.
    """

    found_inf: torch.Tensor | None

    def __init__(
        self,
        groups: Any,
        lr: float,
        pieces: Callable[[torch.Tensor], Iterable[Piece]],
        seed: int = 0,
        decay: float = -0.8,
        eps: float = 1e-30,
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "decay": decay, "eps": eps, "clip": clip, "weight_decay": weight_decay})
        self._pieces, self._seed = pieces, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        runs = [run for group in self.param_groups for tensor in group["params"] for run in self._runs(tensor, group)]
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf > 0
        # All parameters' sums in one exchange each: they are small, and an exchange takes longer to begin than to end.
        for run, sums in zip(runs, _summed(runs, [run.squares() for run in runs]), strict=True):
            run.advance(sums, skip)
        for run, sums in zip(runs, _summed(runs, [run.update_squares() for run in runs]), strict=True):
            run.apply(sums, skip)

    def _runs(self, tensor: torch.Tensor, group: dict[str, Any]) -> Iterator[_Run]:
        if tensor.grad is None:
            return
        state = self.state[tensor]
        # On the CPU, where reading it does not wait for the device.
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["step"] += 1
        gradient = tensor.grad.to_local() if isinstance(tensor.grad, DTensor) else tensor.grad
        gradient = gradient.reshape(-1)
        for piece in self._pieces(tensor):
            run = gradient.narrow(0, piece.offset, piece.span.data.numel())
            yield _Run(piece, run, _moments(piece, state), group, int(state["step"].item()), self._seed)


def _moments(piece: Piece, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter's own moments in the state of an optimizer's tensor, made where they are missing."""
    height, width = _matrix(piece.span.shape)
    sizes = {"row": height, "column": width} if len(piece.span.shape) > 1 else {"moment": width}
    for moment, size in sizes.items():
        if f"{piece.name}/{moment}" not in state:
            zeros = torch.zeros(size, dtype=torch.float32, device=piece.span.data.device)
            state[f"{piece.name}/{moment}"] = zeros
    return {moment: state[f"{piece.name}/{moment}"] for moment in sizes}


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A vector is a matrix of one row, in which the factor for rows is 1 and that for columns goes by element."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


@dataclass
class _Run:
    """One piece in one step; `gradient` is its run of the gradient, one dimension."""

    piece: Piece
    gradient: torch.Tensor
    moments: dict[str, torch.Tensor]
    group: dict[str, Any]
    step: int
    seed: int

    def __post_init__(self) -> None:
        self.height, self.width = _matrix(self.piece.span.shape)
        self._factors: tuple[torch.Tensor | None, torch.Tensor]

    def squares(self) -> torch.Tensor:
        """Sums of this run's squared gradients by row, then by column: [height + width]."""
        sums = torch.zeros(self.height + self.width, dtype=torch.float32, device=self.gradient.device)
        rows, columns = sums.split([self.height, self.width])
        for block in self._blocks():
            squared = block.of(self.gradient).float().square().add_(self.group["eps"])
            rows[block.rows] += squared.sum(dim=1)
            columns[block.columns] += squared.sum(dim=0)
        return sums

    def advance(self, sums: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Take the whole parameter's sums into the moments."""
        rows, columns = sums.split([self.height, self.width])
        weight = self.step ** self.group["decay"]
        found = {"row": rows / self.width, "column": columns / self.height, "moment": columns}
        for name, moment in self.moments.items():
            new = torch.lerp(moment, found[name], weight)
            moment.copy_(new if skip is None else torch.where(skip, moment, new))
        if "row" in self.moments:
            row = self.moments["row"]
            self._factors = (row / row.mean()).rsqrt(), self.moments["column"].rsqrt()
        else:
            self._factors = None, self.moments["moment"].rsqrt()

    def update_squares(self) -> torch.Tensor:
        """Sum of the squares of this run's update before clipping: [1]."""
        total = torch.zeros(1, dtype=torch.float32, device=self.gradient.device)
        for block in self._blocks():
            total += self._update(block).square_().sum()
        return total

    def apply(self, squares: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Update the weight, given the sum of the squares of the whole parameter's update."""
        rms = (squares / (self.height * self.width)).sqrt_()
        lr, decay = self.group["lr"], self.group["weight_decay"]
        scale = -lr / (rms / self.group["clip"]).clamp_(min=1.0)
        span = self.piece.span
        seed = rounding.seed_of(self.seed, self.step, self.piece.name)
        for block in self._blocks():
            update = self._update(block).mul_(scale)
            weight = block.of(span.data)
            if decay:
                update.add_(weight, alpha=-lr * decay)
            if skip is not None:
                update.masked_fill_(skip, 0.0)
            rounding.add(weight.view(-1), update.view(-1), span.start + block.offset, seed)

    def _update(self, block: _Block) -> torch.Tensor:
        row, column = self._factors
        update = block.of(self.gradient) * column[block.columns]
        return update if row is None else update.mul_(row[block.rows].unsqueeze(1))

    def _blocks(self) -> Iterator[_Block]:
        return _blocks(self.piece.span.start, self.gradient.numel(), self.width)


@dataclass(frozen=True)
class _Block:
    """A rectangle of a matrix at `offset` in a run of the flattened one."""

    offset: int
    rows: slice
    columns: slice

    def of(self, run: torch.Tensor) -> torch.Tensor:
        """[rows, columns], a view."""
        height, width = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return run.narrow(0, self.offset, height * width).view(height, width)


def _blocks(start: int, count: int, width: int) -> Iterator[_Block]:
    """Elements [start, start + count) as rectangles: the rest of a row that has begun, whole rows, part of a row."""
    at = 0
    while at < count:
        row, column = divmod(start + at, width)
        if column or count - at < width or width > BLOCK:
            height, length = 1, min(width - column, count - at, BLOCK)
        else:
            height, length = min((count - at) // width, BLOCK // width), width
        yield _Block(at, slice(row, row + height), slice(column, column + length))
        at += height * length


def _summed(runs: list[_Run], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each run's values summed over its workers; those of the same workers in one exchange."""
    together: dict[Any, list[torch.Tensor]] = {}
    for run, value in zip(runs, values, strict=True):
        if run.piece.group is not None:
            together.setdefault((run.piece.group, value.device), []).append(value)
    for (group, _), parts in together.items():
        total = all_reduce(torch.cat(parts), group)
        for part, found in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            part.copy_(found)
    return values
