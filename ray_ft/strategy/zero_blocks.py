"""What is gathered together in ZeRO-3: each block as a unit, and all outside the blocks as another, as in FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ray_ft.errors import ModelError


def prepare(blocks: Iterable[nn.Module]) -> None:
    """Have DeepSpeed gather each block, and reduce its gradients, as a unit. Before it puts its hooks on."""
    for block in blocks:
        block._z3_leaf = True  # what `set_z3_leaf_modules` sets on all modules of a class
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(_input_with_gradient)


def _input_with_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """DeepSpeed reduces a block's gradients when that of its input is there: above frozen embeddings it needs one too.

    Without it that moment is before the block's backward pass, and zeros would be reduced in place of its gradients.
    """
    if not torch.is_grad_enabled():
        return
    hidden = next((i for i in inputs if isinstance(i, torch.Tensor) and i.is_floating_point()), None)
    if hidden is None:
        raise ModelError(
            f"{type(block).__name__} gets its hidden states by keyword, where DeepSpeed's hooks do not see them",
            ["set train.strategy: fsdp, or zero2"],
        )
    if not hidden.requires_grad:
        hidden.requires_grad_()


def gather_rest(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    handles: Iterable[RemovableHandle],
    register: Callable[[nn.Module, nn.Parameter], None],
) -> None:
    """Have what is outside the blocks (embeddings, last norm) gathered once a pass, with the outermost module.

    The loss projects onto the vocabulary as often as this worker's target tokens need: gathering for each call would
    make workers wait for one another, as the others have fewer calls.

    Args:
        module: the outermost one.
        handles: of the hooks that DeepSpeed has put on.
        register: tells DeepSpeed that a module needs a parameter that is not its own.
    """
    inside = {part for block in blocks for part in block.modules()}
    outside = [part for part in module.modules() if part is not module and part not in inside]
    tables = {id(table) for part in outside for table in (part._forward_hooks, part._forward_pre_hooks)}
    for handle in handles:
        if id(handle.hooks_dict_ref()) in tables:
            handle.remove()
    for parameter in {p: None for part in outside for p in part.parameters(recurse=False)}:
        register(module, parameter)
