"""Arithmetic of a training step, counted on the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ray_ft.model.classify import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def flops_per_token(model: PreTrainedModel) -> float:
    """Matrix-product FLOPs of a training step per token: 6 per trained weight, 4 per frozen one (it has no gradient).

    Counted as in Kaplan et al. 2020, over what text passes through: without attention scores, towers for other inputs,
    and embedding look-ups (unless the matrix is also the output projection). An under-count, so that MFU is never
    flattered.
    """
    last = head(model)
    used = {id(p): p for p in [*model.get_decoder().parameters(), *last.parameters()]}
    for part in model.get_decoder().modules():  # Gemma 3n has a second table, for its layers
        if isinstance(part, nn.Embedding) and part.weight is not last.weight:
            used.pop(id(part.weight), None)
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in used.values() if p.dim() >= 2))
