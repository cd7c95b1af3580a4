"""Which of a model's own parameters are trained: parts by name, and patterns of parameter names.

Tied input and output embeddings are one tensor: freezing either freezes it, and it cannot be frozen by one name and
trained by the other. A projector between a tower and the language model is part of none of them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ray_ft.errors import ModelError
from ray_ft.model.classify import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Part → what its modules are called in transformers.
TOWERS = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "audio_tower": ("audio_tower", "audio_model"),
}
#: Of a vision-language model of Gemma's, what images pass through on their way to the language model.
SEEING = ("vision_tower", "multi_modal_projector", "embed_vision")
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
    tensors: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors.setdefault(parameter, set()).add(name)
    off = {entry: _matching(model, entry, "model.freeze") for entry in frozen}
    on = {entry: _matching(model, entry, "model.unfreeze") for entry in trained}
    for parameter, names in tensors.items():
        wanted = {name for matching in on.values() for name in names & matching}
        for entry, matching in off.items():
            if wanted and names & matching and not wanted & matching:
                other = next(other for other, matching in on.items() if names & matching)
                raise ModelError(
                    f"model.freeze names {entry} and model.unfreeze {other}, which are one tensor in this model: "
                    f"{' is '.join(sorted(names))}",
                    ["remove one of them: tied embeddings are frozen or trained together"],
                )
        if wanted:
            parameter.requires_grad_(True)
        elif any(names & matching for matching in off.values()):
            parameter.requires_grad_(False)
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def unreachable(model: PreTrainedModel, *, images: bool = False) -> list[str]:
    """Names of parameters that rows do not pass through, such as a vision tower's: they get no gradient.

    Args:
        images: rows have images, and not text alone.
    """
    reached = {id(p) for p in [*model.get_decoder().parameters(), *head(model).parameters()]}
    if images:  # an audio tower stays unreached
        parts = [part for name in SEEING if (part := getattr(model.base_model, name, None)) is not None]
        reached |= {id(p) for part in parts for p in part.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in reached]


def _matching(model: PreTrainedModel, entry: str, setting: str) -> set[str]:
    """Names that an entry means; of tied tensors the ones by which it means them."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if entry in PARTS:
        modules = {id(module) for module in _modules(model, entry)}
        paths = tuple(f"{path}." for path, module in model.named_modules() if path and id(module) in modules)
        found = {name for name in names if name.startswith(paths)}
        if not found:
            has = [part for part in PARTS if _modules(model, part)]
            raise ModelError(
                f"{setting} names {entry}, and a {type(model).__name__} has none", [f"its parts: {', '.join(has)}"]
            )
        return found
    found = set(fnmatch.filter(names, entry))
    if not found:
        raise ModelError(
            f"{setting} pattern {entry!r} matches no parameter",
            [
                f"parts: {', '.join(part for part in PARTS if _modules(model, part))}",
                f"names look like {', '.join(names[:3])}",
                "patterns match the whole name: *embed_tokens*",
            ],
        )
    return found


def _modules(model: PreTrainedModel, part: str) -> list[nn.Module]:
    if part == "input_embeddings":
        return [model.get_input_embeddings()]
    if part == "output_embeddings":
        return list(filter(None, [model.get_output_embeddings()]))
    if part == "language_model":  # without a classifier's head, which may be all that is trained
        return list(filter(None, [model.get_decoder(), model.get_output_embeddings()]))
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in TOWERS[part]]
