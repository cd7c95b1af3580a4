"""Low-rank adapters beside the linear layers of a frozen base (LoRA, rsLoRA, DoRA), by peft.

peft supplies the layers and their forward passes. Which modules get one is decided here, over qualified names, and the
adapter's values are set here through spans, so that they are the same however many workers share them. Limits: linear
layers only; experts of mixtures that are stacked in one tensor are none.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ray_ft.errors import ModelError
from ray_ft.model import gemma3n, quantize
from ray_ft.model.classify import head
from ray_ft.recipe.model import Adapter
from ray_ft.span import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name for the only one
BASE = ".base_layer."
DOWN, UP, MAGNITUDE = (f".lora_{part}.{ADAPTER}.weight" for part in ("A", "B", "magnitude_vector"))
BLOCK = 1 << 22  # elements that are converted to float64 at once


def stored_name(name: str) -> str | None:
    """The base's name of a parameter, or None where it is the adapter's own."""
    if ".lora_" in name:
        return None
    return name.replace(BASE, ".")


def base_layer(target: str) -> str:
    """Name that an adapted module's original has."""
    return f"{target}{BASE}".rstrip(".")


def scaling(settings: Adapter) -> float:
    """Factor of the product of the two small matrices."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.name == "rslora" else settings.rank)


# --------------------------------------------------------------------------------------------------------- targets


def targets(model: PreTrainedModel, settings: Adapter, unreached: Collection[str] = ()) -> list[str]:
    """Qualified names of the modules that get an adapter, in the model's order.

    Args:
        unreached: parameters that no row reaches; ``all-linear`` leaves their modules out.

    Raises:
        ModelError: a pattern matches no linear layer, or one that cannot have an adapter; or no module is left.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    allowed = [name for name in linear if not _matches(name, settings.exclude_modules)]
    read_past = gemma3n.read_past(model)
    output = next((name for name, module in linear.items() if module is head(model)), None)
    if settings.target_modules == "all-linear":
        found = [name for name in allowed if name not in {output, *read_past} and f"{name}.weight" not in unreached]
    else:
        for pattern in settings.target_modules:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in linear):
                raise _no_match(model, pattern, linear)
        found = [name for name in allowed if _matches(name, settings.target_modules)]
        if lost := [name for name in found if f"{name}.weight" in unreached]:
            raise ModelError(
                f"model.adapter.target_modules names {_some(lost)}, which no row of text reaches",
                [f"add to model.adapter.exclude_modules: {_common(lost)!r}"],
            )
        if past := [name for name in found if name in read_past]:
            raise ModelError(
                f"model.adapter.target_modules names {_some(past)}, whose weight the model reads past the layer, so "
                "that an adapter beside it would be left out",
                ["add to model.adapter.exclude_modules: '*_coefs'", "or set target_modules: all-linear"],
            )
        if output in found and model.get_output_embeddings() is None:
            raise ModelError(
                f"model.adapter.target_modules names {output}, a classifier's last layer, which is trained whole "
                "beside the adapter",
                [f"add to model.adapter.exclude_modules: {output!r}", "or set target_modules: all-linear"],
            )
        if output in found and _tied(model):
            raise ModelError(
                f"model.adapter.target_modules names {output}, whose weight is the input embedding's too (tied): "
                "merging the adapter into it would change the embedding",
                [f"add to model.adapter.exclude_modules: {output!r}", "or set target_modules: all-linear"],
            )
    if not found:
        raise ModelError(
            f"model.adapter: no module is left of target_modules {settings.target_modules!r} without exclude_modules "
            f"{settings.exclude_modules!r}",
            [f"linear layers are called {_leaves(linear)}", "narrow exclude_modules"],
        )
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _no_match(model: nn.Module, pattern: str, linear: Mapping[str, nn.Module]) -> ModelError:
    others = {
        name: type(m).__name__ for name, m in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)
    }
    if others:
        name, kind = next(iter(others.items()))
        return ModelError(
            f"model.adapter.target_modules pattern {pattern!r} matches {name} ({kind}), which is no linear layer",
            [f"linear layers are called {_leaves(linear)}", "train it whole: name it in model.unfreeze"],
        )
    near = difflib.get_close_matches(pattern.replace("*", "").strip(".").lower(), list(_leaf_names(linear)), 3, 0.5)
    known = [f"near: {', '.join(near)}"] if near else []
    return ModelError(
        f"model.adapter.target_modules pattern {pattern!r} matches no module",
        [*known, f"linear layers are called {_leaves(linear)}", 'patterns match the whole name: "*q_proj"'],
    )


def _leaf_names(names: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(name.rpartition(".")[2] for name in names)


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(_leaf_names(names))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _common(names: list[str]) -> str:
    """A pattern of all that share the first name's part of the model."""
    return ".".join(names[0].split(".")[:2]) + "*"


def _tied(model: PreTrainedModel) -> bool:
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name for name, module in model.named_modules() if module is output}
    return output.weight is embedding.weight or any(f"{name}.weight" in tied for name in names)


# ------------------------------------------------------------------------------------------------------- injection


def inject(model: PreTrainedModel, settings: Adapter, names: list[str]) -> None:
    """Put an adapter on each of the named modules, in place, on the meta device; only the adapters stay trained.

    The base's parameters below them are renamed: ``q_proj.weight`` becomes ``q_proj.base_layer.weight``.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    # As an expression: peft takes each name of a list as the end of a module's name, which may match others.
    exactly = "|".join(re.escape(name) for name in names)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.name == "rslora",
        use_dora=settings.name == "dora",
        target_modules=f"(?:{exactly})",
    )
    inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if found != set(names):
        raise ModelError(
            f"peft adapts other modules of {model.config.model_type!r} than asked for: "
            f"{', '.join(sorted(found ^ set(names))[:3])}",
            ["name attention layers in model.adapter.target_modules, such as *q_proj and *v_proj"],
        )


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model computes what its base does. Nothing else changes: parameters are gathered and trained as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # Not peft's `enable_adapters`: it also turns gradients off and on, which strategies that own parameters must see.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


# -------------------------------------------------------------------------------------------------- initial values


@torch.no_grad()
def initialise(model: nn.Module, spans: Mapping[str, Span], seed: int) -> None:
    """Give the adapter its own initial values, in place; the base has its weights. Every worker calls it.

    As in peft: A is drawn uniformly from ±1 ÷ √inputs (Kaiming with a = √5), B is zero, and DoRA's magnitudes are the
    norms of the base weight's rows, so that the adapted model computes what the base does. Each A has a generator of
    its own, from seed and name: values depend neither on the number of workers nor on how tensors are cut up.

    Args:
        spans: this worker's run of each parameter of `model`, by name.
    """
    magnitudes: list[str] = []
    for name, span in spans.items():
        if name.endswith(DOWN):
            span.data.copy_(_uniform(name, span.shape, seed)[span.start : span.stop])
        elif name.endswith(UP):
            span.data.zero_()
        elif name.endswith(MAGNITUDE):
            magnitudes.append(name)
    if not magnitudes:
        return
    squares = [_row_squares(model, spans, name.removesuffix(MAGNITUDE)) for name in magnitudes]
    total = _sum_over_workers(torch.cat(squares)).sqrt().split([len(rows) for rows in squares])
    for name, rows in zip(magnitudes, total, strict=True):
        span = spans[name]
        span.data.copy_(rows[span.start : span.stop])


def _uniform(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator).view(-1)


def _row_squares(model: nn.Module, spans: Mapping[str, Span], target: str) -> torch.Tensor:
    """This worker's share of the sums of squares of a base weight's rows, in float64 on the CPU."""
    span = spans[f"{base_layer(target)}.weight"]
    layer = model.get_submodule(base_layer(target))
    if quantize.is_quantized(layer):  # its span holds codes
        span = Span.whole(quantize.dequantized(layer), span.owner)
    rows, width = span.shape
    sums = torch.zeros(rows, dtype=torch.float64, device=span.data.device)
    if span.owner:
        at = span.start
        while at < span.stop:
            # To the end of a row that has begun, else whole rows, else the beginning of the last one.
            left = span.stop - at
            if at % width or left < width:
                size, height = min(width - at % width, left), 1
            else:
                height = max(min(left, BLOCK) // width, 1)
                size = height * width
            block = span.data[at - span.start : at - span.start + size].view(height, -1)
            sums[at // width : at // width + height] += block.double().square().sum(dim=1)
            at += size
    return sums.cpu()


def _sum_over_workers(values: torch.Tensor) -> torch.Tensor:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    # NCCL sums on GPUs alone, also where offloading keeps the weights in host memory.
    device = torch.device("cuda" if "nccl" in torch.distributed.get_backend() else "cpu")
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values.cpu()


# ---------------------------------------------------------------------------------------------------------- merging


def shapes(settings: Adapter, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's parameters beside a linear layer, by what follows the layer's name."""
    found: dict[str, tuple[int, ...]] = {DOWN: (settings.rank, inputs), UP: (outputs, settings.rank)}
    return {**found, MAGNITUDE: (outputs,)} if settings.name == "dora" else found


@torch.no_grad()
def merge(
    base_weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None, settings: Adapter
) -> torch.Tensor:
    """The one weight that computes what a linear layer and its adapter compute together.

    LoRA: W + s·B·A. DoRA: m · V ÷ ‖V‖ by rows, with V = W + s·B·A (Liu et al. 2024, equation 5).

    Args:
        base_weight: W, [outputs, inputs].
        a: [rank, inputs].
        b: [outputs, rank].
        magnitude: m, [outputs]; of DoRA only.

    Returns:
        [outputs, inputs], in the base weight's dtype; computed in float32.
    """
    merged = torch.addmm(base_weight.float(), b.float(), a.float(), alpha=scaling(settings))
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged.to(base_weight.dtype)
