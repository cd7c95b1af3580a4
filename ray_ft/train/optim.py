"""Optimizers over named parameters, sharded or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ray_ft.errors import ModelError
from ray_ft.recipe import Optimizer
from ray_ft.strategy.base import Piece

#: Names of embedding tables, in transformers' models: the parameter's own name, or its module's.
_TABLE = re.compile(r"embed_(tokens\w*|in|positions)|\w*pos_embed|wte|wpe|(?!patch_)(\w+_)?embeddings?")


def build(
    settings: Optimizer,
    parameters: Iterable[tuple[str, nn.Parameter]],
    pieces: Callable[[torch.Tensor], Iterable[Piece]],
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that are trained; see `decays` for those with weight decay.

    Args:
        parameters: (name, parameter); sharded ones are DTensors.
        pieces: the named runs of which one of the optimizer's tensors consists; asked when it steps.
        seed: of the rounding of weights kept in bfloat16.

    Raises:
        ModelError: nothing is trained.
        ResourceError: an optimizer for GPUs, and weights elsewhere.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    if not trained:
        raise ModelError("no parameter is trained", ["narrow model.freeze"])
    decayed = [p for name, p in trained if decays(name, p)]
    plain = [p for name, p in trained if not decays(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Imported where they are chosen: they bring DTensor, half a second, into commands that only launch.
    if settings.name == "adafactor":
        from ray_ft.train.adafactor import Adafactor

        return Adafactor(groups, settings.lr, pieces, seed)
    if settings.name == "adamw_8bit":
        from ray_ft.train import eight_bit

        eight_bit.check(trained[0][1].device)
        return eight_bit.AdamW8bit(groups, settings.lr, pieces, settings.betas, settings.eps, seed)
    # Fused also on the CPU, where it takes a sixth of the time.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay is for a parameter: not for vectors (biases, norms) and embedding tables.

    A table's rows for absent words would shrink without ever receiving a gradient. It is known by the last part of its
    name, less ``.weight``: ``embed_tokens``, ``wte``, ``position_embedding`` and the like, but not ``patch_embedding``,
    a projection of pixels. Adapters of anything have names of their own (``lora_A``), and decay.
    """
    last = name.removesuffix(".weight").rpartition(".")[2]
    return parameter.dim() > 1 and not _TABLE.fullmatch(last)
