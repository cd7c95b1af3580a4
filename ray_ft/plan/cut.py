"""How a strategy cuts parameters up: exactly, element by element."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_ft.plan.shapes import Parameter, Shapes
from ray_ft.recipe import Train

FP32 = 4


@dataclass(frozen=True)
class Cut:
    """How the parameters lie over the workers.

    Attributes:
        shards: workers that share one copy of the parameters; 1 where each holds all.
        shares: workers that share the optimizer's state.
    """

    strategy: str
    world: int
    shards: int
    shares: int

    @classmethod
    def of(cls, train: Train, nodes: int) -> Cut:
        world = train.world_size
        if train.strategy == "fsdp":
            groups = nodes if isinstance(train.fsdp.replicas, str) else train.fsdp.replicas
            shards = world // groups
            return cls("fsdp", world, shards, shards)
        if train.strategy.startswith("zero"):
            return cls(train.strategy, world, world if train.strategy == "zero3" else 1, world)
        return cls("none", world, 1, 1)

    def largest(self, parameter: Parameter) -> int:
        """Elements that the fullest worker holds of a parameter, padding included."""
        if self.strategy == "fsdp":
            return -(-parameter.shape[0] // self.shards) * parameter.row
        return -(-parameter.numel // self.shards)

    def share(self, parameter: Parameter) -> float:
        """Elements of the optimizer's tensors on a worker."""
        return self.largest(parameter) if self.strategy in ("fsdp", "zero3") else parameter.numel / self.shares

    def unsharded(self, parameters: Iterable[Parameter]) -> int:
        """Elements of parameters when they are gathered, padding included."""
        return sum(self.largest(p) * self.shards for p in parameters)

    def elements(self, parameter: Parameter, rank: int) -> int:
        """Elements that worker `rank` holds of a parameter, exactly."""
        if self.strategy == "fsdp":
            rows, index = -(-parameter.shape[0] // self.shards), rank % self.shards
            return min(rows, max(parameter.shape[0] - index * rows, 0)) * parameter.row
        return self.largest(parameter)


def per_rank_parameter_bytes(shapes: Shapes, train: Train, rank: int, nodes: int = 1) -> int:
    """Bytes of the parameters that worker `rank` keeps, exactly, of plain (not quantized) parameters.

    FSDP: its rows of each. ZeRO-3: its run of each flattened parameter, padded to equal length, in the precision of the
    computation; its float32 copy is the optimizer's. Other strategies: all of them.
    """
    cut = Cut.of(train, nodes)
    return sum(cut.elements(p, rank) * p.itemsize for p in shapes.parameters)
