"""A model as it lies in its folder, on one device, to be asked rather than trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ray_ft.errors import ModelError
from ray_ft.model import attention, classify, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole(
    folder: str, device: torch.device, dtype: torch.dtype, labels: Sequence[str] = (), *, images: bool = False
) -> PreTrainedModel:
    """The model of a local folder, its weights included, in evaluation mode.

    Args:
        labels: of the classifier that it is to be; none: it is a language model.
        images: it is shown images, and not text alone.

    Raises:
        ModelError: it cannot be loaded, or is no classifier of these labels.
    """
    config = load.load_config(folder, labels)
    chosen = attention.choose("auto", device.type, config, dtype, images=images)
    model = load.build(config, chosen.implementation, dtype)
    if classify.new_names(model, load.weight_files(folder)):
        raise ModelError(
            f"{folder!r} is no classifier: it has no {classify.HEAD}",
            ["name a run that was trained with these labels, or its export"],
        )
    load.allocate(model, device)
    load.fill(model, folder, load.whole_spans(model))
    return model.eval()
