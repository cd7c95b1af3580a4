"""Which of a model's own parameters are trained: parts by name, and patterns of parameter names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ray_ft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Part → what its modules are called in transformers.
TOWERS = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "audio_tower": ("audio_tower", "audio_model"),
}
PARTS = ("input_embeddings", "output_embeddings", *TOWERS, "language_model")


def freeze(model: PreTrainedModel, frozen: Sequence[str], trained: Sequence[str]) -> set[str]:
    """Stop training what entries of `frozen` name, and train what entries of `trained` name; the latter win.

    Args:
        frozen, trained: parts (see `PARTS`) or patterns (``*``, ``?``) of qualified parameter names.

    Returns:
        Names of all parameters that are not trained then. All may be: an adapter may follow.

    Raises:
        ModelError: an entry matches nothing (a misspelt one would silently train all), or contradicts another.
    """
    parameters = dict(model.named_parameters())
    off = {entry: _matching(model, entry, "model.freeze") for entry in frozen}
    on = {entry: _matching(model, entry, "model.unfreeze") for entry in trained}
    for parts, others in (("input_embeddings", "output_embeddings"), ("output_embeddings", "input_embeddings")):
        if off.get(parts) and off.get(parts) == on.get(others):
            raise ModelError(
                f"model.freeze names {parts} and model.unfreeze {others}, which are one tensor in this model",
                ["remove one of them: tied embeddings are frozen or trained together"],
            )
    for name in set().union(*off.values()):
        parameters[name].requires_grad_(False)
    for name in set().union(*on.values()):
        parameters[name].requires_grad_(True)
    return {name for name, parameter in parameters.items() if not parameter.requires_grad}


def unreachable(model: PreTrainedModel) -> list[str]:
    """Names of parameters that rows of text do not pass through, such as a vision tower's: they get no gradient."""
    reached = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in reached]


def _matching(model: PreTrainedModel, entry: str, setting: str) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if entry in PARTS:
        found = {names[id(parameter)] for module in _modules(model, entry) for parameter in module.parameters()}
        if not found:
            has = [part for part in PARTS if _modules(model, part)]
            raise ModelError(
                f"{setting} names {entry}, and a {type(model).__name__} has none", [f"its parts: {', '.join(has)}"]
            )
        return found
    found = set(fnmatch.filter(names.values(), entry))
    if not found:
        raise ModelError(
            f"{setting} pattern {entry!r} matches no parameter",
            [
                f"parts: {', '.join(part for part in PARTS if _modules(model, part))}",
                f"names look like {', '.join(list(names.values())[:3])}",
                "patterns match the whole name: *embed_tokens*",
            ],
        )
    return found


def _modules(model: PreTrainedModel, part: str) -> list[nn.Module]:
    if part == "input_embeddings":
        return [model.get_input_embeddings()]
    if part == "output_embeddings":
        return [model.get_output_embeddings()]
    if part == "language_model":
        return [model.get_decoder(), model.get_output_embeddings()]
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in TOWERS[part]]
