"""A model as it lies in its folder, on one device, to be asked rather than trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ray_ft.model import attention, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole(folder: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a local folder, its weights included, in evaluation mode.

    Raises:
        ModelError: it cannot be loaded.
    """
    config = load.load_config(folder)
    model = load.build(config, attention.choose("auto", device.type, config, dtype).implementation, dtype)
    load.allocate(model, device)
    load.fill(model, folder, load.whole_spans(model))
    return model.eval()
