"""The proof that an exported folder, loaded by transformers alone, is the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ray_ft.data.order import Order
from ray_ft.errors import ExportError
from ray_ft.model import load
from ray_ft.model.loss import LossModel
from ray_ft.train.loop import tensors
from ray_ft.trained import Trained
from ray_ft.view import View


@torch.no_grad()
def prove(trained: Trained, folder: str, view: View) -> dict[str, Any]:
    """Compare the folder's answers with those of the trained weights, its adapter unmerged, on a real row.

    Both compute in the exported precision, so the tolerance only covers the order of additions and the rounding of
    merged weights.

    Raises:
        ExportError: keys or logits differ, or as much as an adapter changes them at all.
    """
    from transformers import AutoModelForCausalLM

    config = load.load_config(trained.base)
    dtype = load.stored_dtype(config)
    recipe = trained.recipe
    prepared = trained.prepared("eval") or trained.prepared("train")
    assert prepared is not None
    row = next(Order.once(prepared).slices(0, 1)).read(prepared)
    ids, positions, labels = tensors(row, torch.device("cpu"))

    expected_model = trained.model(torch.device("cpu"), dtype)
    expected = _logits(expected_model, ids, positions)
    expected_loss = float(LossModel(expected_model, recipe.train.loss_chunk)(ids, positions, labels))
    adapter_effect = {}
    if recipe.model.adapter:
        adapter_effect["adapter_logits_change"] = _effect(expected_model, expected, ids, positions)
    expected_names = set(load.stored_names(load.build(config)))
    del expected_model

    with _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    faults = {name: sorted(keys) for name, keys in info.items() if keys}
    if faults or set(load.stored_names(model)) != expected_names:
        raise ExportError(
            f"transformers does not load the exported folder cleanly: {faults}", ["report this with the recipe"]
        )
    found = _logits(model, ids, positions)
    difference = float((found - expected).abs().max())
    tolerance = _tolerance(dtype, expected)
    if not difference <= tolerance:  # also refuses NaN
        raise ExportError(
            f"the exported model's logits differ from the trained ones by {difference:.3g}, over {tolerance:.3g}",
            ["report this with the recipe: what was written is not what was trained"],
        )
    for effect in adapter_effect.values():
        if difference >= effect:  # within the tolerance, and yet no nearer to the trained model than its base is
            raise ExportError(
                f"the exported model's logits differ from the trained ones by {difference:.3g}, and the adapter "
                f"changes them by no more than {effect:.3g}: this may as well be the base model",
                ["train longer, or with a higher train.optimizer.lr", "check model.adapter.target_modules"],
            )
    view.line(f"checked: {len(expected_names)} tensors, logits differ by at most {difference:.1e} (≤ {tolerance:.1e})")
    return {
        "tensors": len(expected_names),
        "logits_max_difference": difference,
        "logits_tolerance": tolerance,
        "row_loss": expected_loss,
        **adapter_effect,
    }


def _logits(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()


def _tolerance(dtype: torch.dtype, logits: torch.Tensor) -> float:
    return 1e-4 if dtype == torch.float32 else 2e-2 * float(logits.abs().max())


def _effect(model: Any, logits: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> float:
    """By how much the adapter changes the logits."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    return float((logits - _logits(model, ids, positions)).abs().max())


class _quiet:
    """Silences the loading bars of transformers for a block."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._restore: Callable[[], None] = logging.enable_progress_bar
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._restore()
