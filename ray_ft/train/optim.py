"""Optimizers over named parameters, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ray_ft.errors import ModelError
from ray_ft.recipe import Optimizer


def build(settings: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that are trained.

    Weight decay is left out for biases and norms (one dimension) and for embeddings, whose rows for absent words would
    otherwise shrink without ever receiving a gradient.

    Raises:
        ModelError: nothing is trained.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    if not trained:
        raise ModelError("no parameter is trained", ["narrow model.freeze"])
    decayed = [p for name, p in trained if p.dim() > 1 and "embed" not in name]
    plain = [p for name, p in trained if p.dim() <= 1 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        fused = trained[0][1].device.type == "cuda"
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
    return Adafactor(groups, lr=settings.lr)


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a given learning rate (Shazeer & Stern 2018, algorithms 4 and 5), sharded or not.

    torch's own scales each step by the parameter's norm, and neither it nor the one in transformers works on DTensors,
    because the column statistics of a matrix sharded by rows need a sum over workers. Second moments of matrices are
    kept as row and column means; the decay rate is 1 − t^−0.8; updates are clipped at root-mean-square 1.
    """

    def __init__(
        self,
        groups: Any,
        lr: float,
        decay: float = -0.8,
        eps: float = 1e-30,
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "decay": decay, "eps": eps, "clip": clip, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(_moments(parameter))
        state["step"] += 1
        beta = 1.0 - state["step"].item() ** group["decay"]
        local, reduce = _local(parameter), _Reduce(parameter)
        gradient = _local(parameter.grad).float()
        squared = gradient.square().add_(group["eps"])
        if parameter.dim() < 2:
            moment = _local(state["moment"]).lerp_(squared, 1 - beta)
            update = gradient * moment.rsqrt()
        else:
            row, column = _local(state["row"]), _local(state["column"])
            row.lerp_(squared.mean(dim=-1), 1 - beta)
            if parameter.dim() == 2:  # the sharded dimension is one of the two that are factored
                sums = reduce(torch.cat([squared.sum(dim=0), row.sum().view(1)]))
                column.lerp_(sums[:-1] / parameter.shape[0], 1 - beta)
                row_mean = sums[-1:] / parameter.shape[0]
            else:
                column.lerp_(squared.mean(dim=-2), 1 - beta)
                row_mean = row.mean(dim=-1, keepdim=True)
            update = gradient * (row / row_mean).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
        rms = (reduce(update.square().sum().view(1)) / parameter.numel()).sqrt()
        update /= (rms / group["clip"]).clamp_(min=1.0)
        if group["weight_decay"]:
            local.mul_(1 - group["lr"] * group["weight_decay"])
        local.sub_(update.to(local.dtype), alpha=group["lr"])


class _Reduce:
    """Sums a tensor over the workers among which a parameter is sharded."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._group = parameter.device_mesh.get_group() if isinstance(parameter, DTensor) else None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self._group is not None:
            torch.distributed.all_reduce(values, group=self._group)
        return values


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero moments of a parameter, sharded like it where they have its rows."""
    shapes = {"moment": parameter.shape}
    if parameter.dim() >= 2:
        shapes = {"row": parameter.shape[:-1], "column": parameter.shape[:-2] + parameter.shape[-1:]}
    if not isinstance(parameter, DTensor):
        return {k: torch.zeros(s, dtype=torch.float32, device=parameter.device) for k, s in shapes.items()}
    from torch.distributed.tensor import zeros

    whole = parameter.dim() == 2  # a matrix's column means have no sharded dimension left
    return {
        name: zeros(
            shape,
            dtype=torch.float32,
            device_mesh=parameter.device_mesh,
            placements=[Replicate() if whole and name == "column" else Shard(0)],
        )
        for name, shape in shapes.items()
    }


def state_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, dict[str, Any]]:
    """The optimizer's state by qualified parameter name, created where no step has created it yet.

    To be called between steps. The tensors are the optimizer's own: filling them restores it.
    """
    _create_state(optimizer)
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """A step of size zero with zero gradients: gives trained parameters without a state theirs, and moves nothing.

    A parameter that no forward pass used never had a gradient; a fresh optimizer, restoring, asks for its state too.
    """
    missing = {p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)}
    if not missing:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter in missing else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in missing:
        for value in optimizer.state[parameter].values():
            _local(value).zero_()
