"""Contiguous pieces of flattened tensors: the one description of shards that all strategies share.

FSDP2 cuts a parameter along its first dimension, ZeRO cuts the flattened parameter anywhere: both give each worker one
contiguous run of the flattened tensor. What fills weights, updates them and writes checkpoints sees only such runs, so
none of it depends on the strategy or the number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """The elements [start, start + len(data)) of a flattened tensor, as one worker holds them.

    Attributes:
        data: one dimension, a view of the storage in use: writing into it changes the parameter or moment. May
            be empty.
        start: offset of the first element in the flattened tensor.
        shape: of the whole tensor; () for a scalar.
        owner: whether this worker writes it into checkpoints. Of workers with the same elements one does.
    """

    data: torch.Tensor
    start: int
    shape: tuple[int, ...]
    owner: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def like(self, data: torch.Tensor) -> Span:
        """The same run of another tensor of this shape, such as a moment of the parameter."""
        return Span(data.view(-1), self.start, self.shape, self.owner)

    @classmethod
    def whole(cls, tensor: torch.Tensor, owner: bool = True) -> Span:
        """A tensor that is not cut up."""
        return cls(tensor.detach().view(-1), 0, tuple(tensor.shape), owner)
