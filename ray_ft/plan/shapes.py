"""What a model consists of, read off its config: no weights, no network where the config is at hand.

The model is built on the meta device and adapted as training does it; what is left of it here are names, shapes and
which of them are trained, gathered together, or held in 4 bits. Limits: text only, so that towers for other inputs take
memory and no time; layers that route tokens by their content (mixtures of experts) are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_ft import hub, paths
from ray_ft.errors import ModelError
from ray_ft.model import adapt, adapter, classify, gemma3n, load, quantize
from ray_ft.model.flops import flops_per_token
from ray_ft.model.loss import decoder_layers
from ray_ft.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ray_ft.model.adapt import Adapted

ROOT = -1  # index of the group of all that is in no block


@dataclass(frozen=True)
class Parameter:
    """`group`: the block that it is gathered with, or `ROOT`. `itemsize`: bytes of an element as it is kept."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    itemsize: int
    group: int
    quantized: bool = False
    adapter: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of one row of dimension 0."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return quantize.stored_bytes(self.numel) if self.quantized else self.numel * self.itemsize


@dataclass(frozen=True)
class Shapes:
    """A model as the planner sees it.

    Attributes:
        compute: itemsize of the precision of the computation, in bytes.
        buffers: bytes of all buffers.
        blocks: of each block what distinguishes kinds of blocks; None where text does not pass through it.
        head: names of the parameters that the loss uses, and of the embedding, in this order; they may be one.
        text_flops: FLOPs per token of matrix products, forward and backward, 6 per trained and 4 per frozen weight.
        text_weights: weights that a token is multiplied with, those of the blocks alone.
        attention: per text layer, how many places a token attends to at most (its window or the row), and
            heads × head_dim.
    """

    parameters: tuple[Parameter, ...]
    compute: int
    buffers: int
    blocks: tuple[Any, ...]
    head: tuple[str, str]
    text_flops: float
    text_weights: int
    attention: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def trained(self) -> int:
        return sum(p.numel for p in self.parameters if p.trained)

    def group(self, index: int) -> list[Parameter]:
        return [p for p in self.parameters if p.group == index]

    @property
    def text_blocks(self) -> list[int]:
        return [index for index, kind in enumerate(self.blocks) if kind is not None]

    def named(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)


def find_config(location: str, file: str | None = None, labels: Sequence[str] = ()) -> PretrainedConfig:
    """The config of a model: of `file`, a local folder, what is shipped with this package, or the hub, in this order.

    Args:
        labels: of a classifier; see `load.load_config`.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    if file:
        return _read(paths.absolute(file))
    shipped = _shipped(location)
    if shipped is not None and not os.path.isdir(location):
        return _parse(shipped, f"the shipped config of {location}")
    try:
        return load.load_config(hub.model_folder(location, weights=False), labels)
    except ModelError as error:
        raise ModelError(error.what, [*error.ways_out, "or name its config.json: --config FILE"]) from error


def shipped_models() -> list[str]:
    """Hub ids whose configs come with this package, without -it and -pt."""
    names = [entry.name for entry in resources.files("ray_ft.plan").joinpath("models").iterdir()]
    return sorted(name.removesuffix(".json").replace("--", "/") for name in names if name.endswith(".json"))


def _shipped(location: str) -> dict[str, Any] | None:
    """Gemma's own repositories are gated; the tuned and the untuned model have the same shape."""
    base = location.removesuffix("-it").removesuffix("-pt")
    if base not in shipped_models():
        return None
    name = base.replace("/", "--") + ".json"
    return json.loads(resources.files("ray_ft.plan").joinpath("models", name).read_text(encoding="utf-8"))


def _read(location: str) -> PretrainedConfig:
    try:
        return _parse(paths.read_json(location), location)
    except (OSError, ValueError) as error:
        raise ModelError(f"--config {location!r} cannot be read: {error}", ["name a model's config.json"]) from error


def _parse(content: Any, where: str) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        settings = dict(content)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{where} is no usable config: {error}", ["name a model's config.json"]) from error


def build(config: PretrainedConfig, recipe: Recipe, compute: torch.dtype) -> tuple[PreTrainedModel, Adapted]:
    """The recipe's model on the meta device, adapted as in training; what is quantized there keeps its shape here."""
    if recipe.model.labels:
        config = classify.labelled(config, recipe.model.labels, recipe.model.path)
    model = load.build(config, "eager" if recipe.model.attention == "eager" else "sdpa", compute)
    # DeepSpeed computes with trained weights in the precision of the computation; its float32 copy is the optimizer's.
    weights = compute if recipe.train.strategy.startswith("zero") else getattr(torch, recipe.train.optimizer.weights)
    images = recipe.data.images is not None
    return model, adapt.adapt(model, recipe.model, weights, compute, packed=False, images=images)


def read(model: PreTrainedModel, recipe: Recipe, compute: torch.dtype, quantized: Collection[str] = ()) -> Shapes:
    """All that the planner needs of a model.

    Args:
        quantized: names that the base's checkpoint has for weights held in 4 bits.
    """
    units = decoder_layers(model)
    group_of = {id(p): index for index, unit in enumerate(units) for p in unit.parameters()}
    text = {id(part) for part in model.get_decoder().modules()}
    parameters = tuple(
        Parameter(
            name,
            tuple(p.shape),
            p.requires_grad,
            p.element_size(),
            group_of.get(id(p), ROOT),
            adapter.stored_name(name) in quantized,
            adapter.stored_name(name) is None,
        )
        for name, p in model.named_parameters()
    )
    names = {id(p): name for name, p in model.named_parameters()}
    head, embedding = classify.head(model).weight, model.get_input_embeddings().weight
    text_units = [unit for unit in units if id(unit) in text]
    return Shapes(
        parameters=parameters,
        compute=compute.itemsize,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        blocks=tuple(_kind(unit) if id(unit) in text else None for unit in units),
        head=(names[id(head)], names[id(embedding)]),
        text_flops=flops_per_token(model),
        text_weights=sum(p.numel() for unit in text_units for p in unit.parameters() if p.dim() >= 2),
        attention=tuple(attended(model.config.get_text_config(), recipe.data.seq_len)),
    )


def _kind(unit: nn.Module) -> tuple[Any, ...]:
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in unit.named_parameters()]
    return *shapes, *gemma3n.kind(unit)


def attended(config: Any, seq_len: int) -> Iterable[tuple[int, int]]:
    """`Shapes.attention` of a language model's config, a layer after the other."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in kinds:
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        yield min(seq_len, window or seq_len), config.num_attention_heads * head_dim
