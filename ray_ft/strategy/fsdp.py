"""FSDP2: parameters, gradients and optimizer state in shards, gathered block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ray_ft.strategy.base import NamedParameters, Strategy


class FSDP(Strategy):
    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[], None],
        make_optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
    ) -> None:
        mesh = init_device_mesh(self.layout.device.type, (self.layout.world,), mesh_dim_names=("shard",))
        lowered = self.layout.dtype != torch.float32
        # Gradients are summed in float32: in bfloat16 the sum over many workers would lose the small ones.
        policy = MixedPrecisionPolicy(
            param_dtype=self.layout.dtype if lowered else None, reduce_dtype=torch.float32 if lowered else None
        )
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        root = fully_shard(module, mesh=mesh, mp_policy=policy)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # The loss is already divided by the global number of tokens, so gradients are summed, not averaged.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        # On the outermost module: its hooks then take the new tensors over before the optimizer sees them.
        root.to_empty(device=self.layout.device)
        fill()
        self.module, self._root = module, root
        self.optimizer = make_optimizer(module.named_parameters())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        # The outermost module keeps its parameters gathered until a backward pass, which does not come here.
        self._root.reshard()

    def precision(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the mixed-precision policy casts inside the hooks

    def finish(self, clip_norm: float | None) -> torch.Tensor:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm is not None else float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
