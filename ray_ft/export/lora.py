"""The adapter alone, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained` reads it beside the base, and so does vLLM (``--enable-lora``). Values are written as
they were trained, in float32; readers round them to the precision that they compute in. Limits: what is trained beside
an adapter (model.unfreeze) and a base rounded to 4 bits are in no adapter; such runs are exported merged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from ray_ft.errors import ExportError
from ray_ft.export.tensorfile import Entry, Writer
from ray_ft.export.weights import by_layer
from ray_ft.model import adapter, load
from ray_ft.trained import Trained

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: What PEFT writes before the name of a module.
PREFIX = "base_model.model."
#: What it writes behind it, by how a checkpoint says it.
PARTS = {
    adapter.DOWN: ".lora_A.weight",
    adapter.UP: ".lora_B.weight",
    adapter.MAGNITUDE: ".lora_magnitude_vector",
}


def refuse(trained: Trained, vllm: bool | None) -> None:
    """Refuse runs whose adapter alone is not what was trained.

    Raises:
        ExportError: there is no adapter, more than it was trained, or vLLM cannot load its kind.
    """
    settings = trained.recipe.model
    merged = "export the whole model, with the adapter merged: leave --adapter-only out"
    if trained.labels:
        raise ExportError(
            "the run trained a classifier, whose last layer is no part of an adapter and is in no base that it could "
            "lie beside",
            [merged],
        )
    if settings.adapter is None:
        raise ExportError("the run has no adapter (model.adapter is null), so there is none to export alone", [merged])
    if settings.quantize:
        raise ExportError(
            f"the adapter was trained beside a base rounded to 4 bits (model.quantize: {settings.quantize}); beside "
            f"{settings.path} itself it answers otherwise",
            [merged],
        )
    others = sorted(filter(None, map(adapter.stored_name, trained.trained_names())))
    if others:
        raise ExportError(
            f"model.unfreeze trained {', '.join(others[:3])}{' …' if len(others) > 3 else ''} beside the adapter, "
            "which does not hold it",
            [merged],
        )
    if settings.adapter.name == "dora" and vllm is not False:
        raise ExportError(
            "vLLM serves no DoRA adapter beside its base (model.adapter.name: dora)",
            [merged, "for other readers, without a check by vLLM: --no-vllm", "train with model.adapter.name=rslora"],
        )


def entries(trained: Trained) -> dict[str, tuple[str, Entry]]:
    """Name in PEFT's file → (name in the checkpoint, what it is), by layer, in the model's order."""
    settings = trained.recipe.model.adapter
    assert settings is not None
    names = trained.trained_names()
    model = load.build(trained.config())
    found = {}
    for layer, module in model.named_modules():
        if f"{layer}{adapter.DOWN}" not in names:
            continue
        for part, shape in adapter.shapes(settings, *module.weight.shape).items():
            found[f"{PREFIX}{layer}{PARTS[part]}"] = (f"{layer}{part}", Entry.of(torch.float32, shape))
    return found


def matrices(
    trained: Trained, wanted: dict[str, tuple[str, Entry]], part: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Key → tensor of `entries`, those of one layer in memory at once.

    Args:
        part: only tensors whose name in the checkpoint ends with it.
    """
    for keys in by_layer([key for key, (name, _) in wanted.items() if name.endswith(part)]):
        read = {key: torch.empty(wanted[key][1].shape, dtype=wanted[key][1].dtype) for key in keys}
        trained.read({wanted[key][0]: tensor for key, tensor in read.items()})
        yield from read.items()


def write(trained: Trained, folder: str) -> None:
    """Write the two files."""
    found = entries(trained)
    with Writer(os.path.join(folder, WEIGHTS), {key: entry for key, (_, entry) in found.items()}) as out:
        for key, tensor in matrices(trained, found):
            out.write(key, tensor)
    _config(trained, [key.removeprefix(PREFIX) for key in found]).save_pretrained(folder)


def _config(trained: Trained, keys: list[str]) -> Any:
    from peft import LoraConfig

    settings = trained.recipe.model.adapter
    assert settings is not None
    layers = {key.removesuffix(PARTS[adapter.DOWN]): None for key in keys if key.endswith(PARTS[adapter.DOWN])}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.name == "rslora",
        use_dora=settings.name == "dora",
        target_modules=list(layers),  # whole names: the last part alone may also name layers of a vision tower
        task_type="CAUSAL_LM",
        base_model_name_or_path=trained.recipe.model.path,
        revision=trained.recipe.model.revision,
        inference_mode=True,
    )
