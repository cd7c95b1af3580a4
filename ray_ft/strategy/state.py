"""An optimizer's state as spans by parameter and moment, whatever tensors the optimizer works on.

What its tensors mean is read off their names and sizes: "<parameter>/<moment>" and scalars are whole, the same on all
workers that have them; any other has one number for each element of the optimizer's tensor, and is cut up like it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch.distributed.tensor import DTensor

from ray_ft.span import Span
from ray_ft.strategy.base import Piece


@runtime_checkable
class Packed(Protocol):
    """An optimizer that holds its state in another form than checkpoints do."""

    def unpacked(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one of its tensors, as checkpoints hold it."""

    def pack(self) -> None:
        """Take over what the tensors given by `unpacked` have been filled with."""


def moments(
    optimizer: torch.optim.Optimizer, pieces: Callable[[torch.Tensor], Iterable[Piece]], owner: bool
) -> dict[str, dict[str, Span]]:
    """This worker's runs of the optimizer's state by parameter and moment, created where no step has created it yet.

    To be called between steps. The spans' data are the optimizer's own, or are taken over by `restored`.

    Args:
        pieces: the named runs of which one of the optimizer's tensors consists.
        owner: whether this worker writes what all have whole.
    """
    create(optimizer)
    packed = optimizer if isinstance(optimizer, Packed) else None
    found: dict[str, dict[str, Span]] = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            held = optimizer.state[tensor] if packed is None else packed.unpacked(tensor)
            for piece in pieces(tensor):
                found[piece.name] = dict(_of(piece, tensor, held, owner))
    return found


def _of(
    piece: Piece, tensor: torch.Tensor, held: Mapping[str, torch.Tensor], owner: bool
) -> Iterator[tuple[str, Span]]:
    count = local(tensor).numel()
    for key, value in held.items():
        parameter, _, moment = key.rpartition("/")
        if parameter:
            if parameter == piece.name:
                yield moment, Span.whole(value, owner)
        elif value.dim() == 0:
            yield key, Span.whole(value, owner)
        elif (own := local(value)).numel() == count:
            yield key, piece.span.like(own.detach().view(-1).narrow(0, piece.offset, piece.span.data.numel()))
        else:
            raise TypeError(f"the optimizer's state {key!r} of shape {tuple(value.shape)} belongs to no parameter")


def restored(optimizer: torch.optim.Optimizer) -> None:
    """To be called after the data of `moments` have been changed."""
    if isinstance(optimizer, Packed):
        optimizer.pack()


def create(optimizer: torch.optim.Optimizer) -> None:
    """Give trained tensors without a state theirs, all zeros; moves nothing and counts no step.

    A parameter that no forward pass used never had a gradient; a fresh optimizer, restoring, asks for its state too.
    Each gets a step of size zero with a gradient of zero, one at a time, since together such gradients would take as
    much memory as the weights. All workers have to call it where one does.
    """
    groups = optimizer.param_groups
    missing = [tensor for group in groups for tensor in group["params"] if not optimizer.state.get(tensor)]
    if not missing:
        return
    rates = [group["lr"] for group in groups]
    gradients = [(tensor, tensor.grad) for group in groups for tensor in group["params"]]
    for tensor, _ in gradients:
        tensor.grad = None
    for group in groups:
        group["lr"] = 0.0
    for tensor in missing:
        tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        tensor.grad = None
        for value in optimizer.state[tensor].values():
            local(value).zero_()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for tensor, gradient in gradients:
        tensor.grad = gradient


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # without a node of autograd for each
        return tensor.to_local()
