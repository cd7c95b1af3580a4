"""Flat tensors: an optimizer's tensors that hold runs of many parameters behind one another, as ZeRO's do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ray_ft.span import Span
from ray_ft.strategy.base import Piece


@dataclass(frozen=True)
class Run:
    """A parameter's elements [start, start + count), at `offset` in a flat tensor.

    `cut`: whether other workers hold the rest of the parameter. `count` may be 0.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    count: int
    cut: bool

    @property
    def takes_part(self) -> bool:
        """Whether this worker updates the parameter, or takes part in sums over those that do."""
        return self.cut or self.count > 0

    def of(self, flat: torch.Tensor) -> Span:
        """The run of a flat tensor with these elements."""
        return Span(flat.detach().narrow(0, self.offset, self.count), self.start, self.shape, self.count > 0)


@dataclass(frozen=True)
class Flat:
    """One of the optimizer's tensors.

    Attributes:
        number: of this tensor, in the order in which they are updated.
        group: the optimizer's parameter group that it belongs to.
        swapped: whether its data are on disk but for the time of its update.
    """

    data: torch.Tensor
    number: int
    group: int
    runs: tuple[Run, ...]
    swapped: bool = False

    def pieces(self) -> Iterator[Piece]:
        """What it consists of, in the same order on all workers.

        Of a parameter that is cut every worker has a piece, if only an empty one, as its sums need them all.
        """
        for run in self.runs:
            if run.takes_part:
                yield Piece(run.name, run.offset, run.of(self.data), dist.group.WORLD if run.cut else None)

    def moments(self, state: Mapping[str, torch.Tensor], size: int) -> Iterator[tuple[str, dict[str, Span]]]:
        """(parameter, its moments) out of the optimizer's state of this tensor; see `strategy.state` for its entries.

        Of what several workers hold whole, the one with the parameter's first element is the owner.

        Args:
            size: elements of this tensor, also where it is on disk.
        """
        for run in self.runs:
            if not run.takes_part:
                continue
            first, found = run.start == 0 and run.count > 0, {}
            for key, value in state.items():
                parameter, _, moment = key.rpartition("/")
                if parameter:
                    if parameter == run.name:
                        found[moment] = Span.whole(value, owner=first)
                elif value.dim() == 0:
                    found[key] = Span.whole(value, owner=first)
                elif value.numel() == size:
                    found[key] = run.of(value)
                else:
                    raise TypeError(f"the optimizer's state {key!r} of shape {tuple(value.shape)} is not a flat tensor")
            yield run.name, found


def cut_each(
    optimizer: Any, names: Mapping[nn.Parameter, str], shapes: Mapping[str, tuple[int, ...]], rank: int, world: int
) -> list[Flat]:
    """The tensors of ZeRO-3: every parameter is cut into runs of equal length, the last one padded.

    Args:
        optimizer: DeepSpeed's.
    """
    found = []
    for number, parameters in enumerate(optimizer.fp16_groups):
        runs, offset = [], 0
        for parameter in parameters:
            name, length = names[parameter], parameter.partition_numel()
            start = min(rank * length, parameter.ds_numel)
            count = min(length, parameter.ds_numel - start)
            runs.append(Run(name, shapes[name], offset, start, count, world > 1))
            offset += length
        data, group = optimizer.fp32_partitioned_groups_flat[number], optimizer.sub_group_to_group_id[number]
        found.append(Flat(data, number, group, tuple(runs), swapped=data.numel() < offset))
    return found


def cut_together(
    tensors: Iterable[torch.Tensor],
    grouped: Iterable[Iterable[nn.Parameter]],
    names: Mapping[nn.Parameter, str],
    shapes: Mapping[str, tuple[int, ...]],
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> list[Flat]:
    """The tensors of ZeRO-1 and 2: a group's parameters form one, which is cut into as many parts as there are workers.

    Args:
        tensors: of each of the optimizer's groups.
        grouped: the parameters of each group.
        all_reduce: sums over workers; `device` is where they can.
    """
    grouped = [list(group) for group in grouped]
    held = torch.tensor([float(p._hp_mapping is not None) for group in grouped for p in group], device=device)
    holders, found = iter(all_reduce(held).tolist()), []
    for number, (data, parameters) in enumerate(zip(tensors, grouped, strict=True)):
        runs = []
        for parameter in parameters:
            name, offset, start, count = names[parameter], 0, 0, 0
            if (mapping := parameter._hp_mapping) is not None:
                offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
                count = mapping.hp_fragment_address.numel
            runs.append(Run(name, shapes[name], offset, start, count, next(holders) > 1))
        found.append(Flat(data, number, number, tuple(runs)))
    return found
