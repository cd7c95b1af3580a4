"""Activations that are computed again in the backward pass instead of being kept (Chen et al. 2016), layer by layer.

All layers' take a third more time in full training and half more with adapters; where memory for some layers'
activations is left, a share of the layers gives that time back. The first ones are recomputed: their turn in the
backward pass comes last, when the others' activations are gone, so that what one of them needs for itself adds nothing
to the peak.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ray_ft.errors import ModelError
from ray_ft.model.loss import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable(model: PreTrainedModel, setting: bool | float) -> None:
    """Have layers recomputed, as `train.gradient_checkpointing` says; towers with all of them, whatever the share.

    Raises:
        ModelError: a share is wanted, and the family's layers cannot be told one by one.
    """
    if setting is False:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting is True:
        return
    text = {id(part) for part in model.get_decoder().modules()}
    layers = [layer for layer in decoder_layers(model) if id(layer) in text]
    if not layers or not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise ModelError(
            f"train.gradient_checkpointing = {setting:g}: {type(model).__name__} recomputes all layers or none",
            ["train.gradient_checkpointing=true", "train.gradient_checkpointing=false"],
        )
    for layer in layers[recomputed(len(layers), setting) :]:
        layer.gradient_checkpointing = False


def recomputed(layers: int, setting: bool | float) -> int:
    """How many of the language model's layers are recomputed: of a share, rounded up."""
    return math.ceil(layers * setting)
