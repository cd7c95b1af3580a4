"""FSDP2: parameters, gradients and optimizer state in shards, gathered block by block.

With `replicas` above one (HSDP) each group of workers holds a whole copy: gathering stays within the group, such as one
node, and only the gradients' shards are summed between groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ray_ft import recipe
from ray_ft.errors import ResourceError
from ray_ft.span import Span
from ray_ft.strategy.base import Layout, Updater
from ray_ft.strategy.collective import all_reduce
from ray_ft.strategy.direct import Direct


class FSDP(Direct):
    def __init__(self, layout: Layout, settings: recipe.FSDP, in_backward: bool = False) -> None:
        super().__init__(layout, in_backward)
        self._settings = settings

    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[Mapping[str, Span]], None],
        make_optimizer: Updater,
    ) -> None:
        self.wrap(module, list(blocks))
        # On the outermost module: its hooks then take the new tensors over before the optimizer sees them.
        self._root.to_empty(device="cpu" if self._settings.cpu_offload else self.layout.device)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.layout.device)  # offloading is for parameters
        fill(self.spans())
        self._make_optimizers(make_optimizer)

    def wrap(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Cut the parameters up, and hook their gathering in; nothing is allocated on the meta device."""
        settings = self._settings
        self._mesh = _mesh(self.layout, settings.replicas)
        # Gradients are summed in float32: in bfloat16 the sum over many workers would lose the small ones.
        policy = MixedPrecisionPolicy(param_dtype=self.layout.dtype, reduce_dtype=torch.float32)
        # Without pinned memory where there is no GPU to copy to.
        offload = CPUOffloadPolicy(pin_memory=self.layout.device.type == "cuda")
        offload_policy = offload if settings.cpu_offload else OffloadPolicy()
        for block in blocks:
            fully_shard(
                block,
                mesh=self._mesh,
                reshard_after_forward=settings.reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload_policy,
            )
        self._root = fully_shard(module, mesh=self._mesh, mp_policy=policy, offload_policy=offload_policy)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # The loss is already divided by the global number of tokens, so gradients are summed, not averaged.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        if settings.prefetch:
            _prefetch(blocks, settings.prefetch)
        self.module = module

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        # What stays gathered after its forward pass waits for a backward pass, which does not come here.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def precision(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the mixed-precision policy casts inside the hooks

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if self._mesh.ndim > 1:
            self._root.set_requires_all_reduce(last)  # between groups once per step, not per backward pass
        loss.backward()

    def _span(self, parameter: torch.Tensor) -> Span:
        assert isinstance(parameter, DTensor)
        with torch.no_grad():  # without a node of autograd for each, which takes longer than all the rest
            local = parameter.to_local().detach()
        row = parameter.numel() // parameter.shape[0]
        owner = self._mesh.ndim == 1 or self._mesh.get_local_rank("replicate") == 0
        return Span(local.view(-1), first_row(parameter) * row, tuple(parameter.shape), owner)

    def _group(self, parameter: torch.Tensor) -> torch.distributed.ProcessGroup | None:
        return self._mesh.get_group("shard")

    def _reduce_squares(self, total: torch.Tensor) -> torch.Tensor:
        return all_reduce(total, self._mesh.get_group("shard"))

    def _complete(self) -> list[torch.Tensor]:
        return [p for _, p in self._trained() if p.grad is not None]


def _mesh(layout: Layout, replicas: int | str) -> DeviceMesh:
    groups = layout.nodes if isinstance(replicas, str) else replicas
    if layout.world % groups:
        raise ResourceError(
            f"train.fsdp.replicas = {replicas!r} asks for {groups} equal groups of {layout.world} workers",
            ["train.fsdp.replicas=1", "as many workers on each node"],
        )
    if groups == 1:
        return init_device_mesh(layout.device.type, (layout.world,), mesh_dim_names=("shard",))
    shape = (groups, layout.world // groups)
    return init_device_mesh(layout.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _prefetch(blocks: list[nn.Module], ahead: int) -> None:
    # Among blocks of a kind: a tower's blocks, gathered for a pass that does not come, would stay gathered.
    for kind in {type(block) for block in blocks}:
        alike = [block for block in blocks if type(block) is kind]
        for at, block in enumerate(alike):
            assert isinstance(block, FSDPModule)
            block.set_modules_to_forward_prefetch(alike[at + 1 : at + 1 + ahead])
            block.set_modules_to_backward_prefetch(alike[max(at - ahead, 0) : at][::-1])


def first_row(parameter: DTensor) -> int:
    """Row of dimension 0 at which this worker's shard begins; the number of rows where it has none."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] if shape[0] else parameter.shape[0]
