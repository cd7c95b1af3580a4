"""What of a model is trained, decided on the meta device: parts frozen by name, 4-bit layers, adapters, precisions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ray_ft.errors import ModelError
from ray_ft.model import adapter, freeze, gemma3n, quantize
from ray_ft.model.classify import head, is_classifier
from ray_ft.recipe.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapted:
    """What `adapt` made of a model.

    Attributes:
        trained: elements that are trained, the adapter's included.
        total: elements of base and adapter together; tied ones once.
        adapter: such as "lora rank 16 on 434 layers"; empty without one.
        quantized: the base's names of weights in 4 bits.
        unreached: parts that are frozen only because no row of text reaches them.
    """

    trained: int
    total: int
    adapter: str = ""
    quantized: frozenset[str] = frozenset()
    unreached: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.trained == self.total:
            return f"training all {_short(self.total)} parameters"
        line = f"training {_short(self.trained)} of {_short(self.total)} parameters ({self.trained / self.total:.2%})"
        how = [self.adapter] if self.adapter else []
        how += [f"{len(self.quantized)} layers of the base in 4 bits"] if self.quantized else []
        return f"{line}: {', '.join(how)}" if how else line

    @property
    def lines(self) -> list[str]:
        """All that there is to say, for people."""
        if not self.unreached:
            return [self.summary]
        return [self.summary, f"not trained, since rows of text do not reach them: {', '.join(self.unreached)}"]


def adapt(
    model: PreTrainedModel,
    settings: Model,
    weights: torch.dtype,
    frozen: torch.dtype,
    *,
    packed: bool = True,
    images: bool = False,
) -> Adapted:
    """Settle what of a model on the meta device is trained, in place.

    An adapter freezes the whole base but a classifier's head; `settings.unfreeze` names what else is trained.
    Parameters that text never reaches are frozen too: they would have no gradient.

    Args:
        weights: precision in which trained parameters are kept.
        frozen: precision of all others. Buffers stay as they are.
        images: rows may have images, so that the vision tower and its projector are reached too.
        packed: hold what is quantized in 4 bits; else the layers stay as they are, to be filled with rounded weights.

    Raises:
        ModelError: an entry of freeze, unfreeze or the adapter's targets matches nothing or cannot be trained, or
            nothing is left to train; or rows have images, and what their tower needs is not installed.
        ResourceError: 4-bit layers are wanted, and bitsandbytes is not installed.
    """
    if images and gemma3n.lacks_tower(model):
        raise gemma3n.no_tower()
    total = _elements(model.parameters())
    unreached = set(freeze.unreachable(model, images=images))
    parameters = dict(model.named_parameters())
    if settings.adapter:
        model.requires_grad_(False)
        if is_classifier(model.config):  # its head is new, or was made for other rows
            head(model).requires_grad_(True)
    freeze.freeze(model, settings.freeze, settings.unfreeze)
    idle = {name for name in unreached if parameters[name].requires_grad}
    _refuse_unreached(model, settings, unreached)
    for name in idle:
        parameters[name].requires_grad_(False)
    whole = [parameter for parameter in parameters.values() if parameter.requires_grad]

    # Towers are small, and keep their precision also where they are reached.
    quantized = quantize.targets(model, set(freeze.unreachable(model))) if settings.quantize else []
    names: list[str] = []
    described = ""
    if settings.adapter:
        names = adapter.targets(model, settings.adapter, unreached)
        adapter.inject(model, settings.adapter, names)
        for parameter in whole:  # peft has frozen all but its own
            parameter.requires_grad_(True)
        own = [parameter for name, parameter in model.named_parameters() if adapter.stored_name(name) is None]
        total += _elements(own)
        whole += own
        described = f"{settings.adapter.name} rank {settings.adapter.rank} on {len(names)} layers"
    if quantized and packed:
        layers = [adapter.base_layer(name) if name in names else name for name in quantized]
        quantize.quantize(model, layers, frozen)
    if not whole:
        raise ModelError(
            f"model.freeze {settings.freeze} leaves nothing to train",
            ["narrow it", "name what is to be trained in model.unfreeze", "or add model.adapter"],
        )
    _cast(model, weights, frozen)
    parts = () if settings.adapter else _parts(idle, parameters)
    return Adapted(_elements(whole), total, described, frozenset(f"{name}.weight" for name in quantized), parts)


def _refuse_unreached(model: nn.Module, settings: Model, unreached: Collection[str]) -> None:
    # An entry that names other parts as well, such as "*norm*", is taken to mean those.
    parameters = dict(model.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for entry in settings.unfreeze:
        model.requires_grad_(False)
        freeze.freeze(model, (), (entry,))
        named = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if named and named <= set(unreached):
            raise ModelError(
                f"model.unfreeze {entry!r} names {', '.join(_parts(named, parameters)[:3])}, which rows of text never "
                "reach: nothing could be learnt there",
                ["remove it from model.unfreeze"],
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(before[name])


def _cast(model: nn.Module, weights: torch.dtype, frozen: torch.dtype) -> None:
    codes = {name for name, _ in quantize.layers(model)}
    for name, parameter in model.named_parameters():
        if name not in codes:
            parameter.data = parameter.data.to(weights if parameter.requires_grad else frozen)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _parts(names: Collection[str], everything: Collection[str]) -> tuple[str, ...]:
    """The largest parts of a model that consist of the named parameters alone."""
    others = [name for name in everything if name not in names]
    found: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        prefixes = (".".join(pieces[:depth]) for depth in range(1, len(pieces) + 1))
        part = next(prefix for prefix in prefixes if not any(o == prefix or o.startswith(prefix + ".") for o in others))
        found[part.removeprefix("model.")] = None
    return tuple(sorted(found))


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
