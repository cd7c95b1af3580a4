"""Hugging Face folder to module: built on the meta device, filled shard by shard, every key accounted for.

No process ever holds more than its own shard plus one block: parameters are laid out first (sharded or not), then each
is filled from the rows of the safetensors file that it needs. A missing or unexpected key stops the run, because
`from_pretrained` would only warn and train random weights.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_ft.errors import ModelError
from ray_ft.model import quantize
from ray_ft.model.adapter import stored_name
from ray_ft.span import Span

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK = 1 << 25  # elements that are read at once


def load_config(folder: str) -> PretrainedConfig:
    """The model's config.

    Raises:
        ModelError: config.json is missing, broken, or of a family that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"model.path {folder!r} has no usable config.json: {str(error).splitlines()[0]}",
            ["name the folder that holds config.json, the tokenizer and *.safetensors"],
        ) from error


def build(config: PretrainedConfig, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device: shapes and names, no memory.

    A config with parts besides its language model (such as a vision tower) gives the class that has them all: the
    language model's class alone would not find its weights in such a checkpoint.

    Args:
        attention: an implementation of transformers', as `attention.choose` names it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    several = config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    factory = AutoModelForImageTextToText if several else AutoModelForCausalLM
    with torch.device("meta"):
        return factory.from_config(config, dtype=dtype, attn_implementation=attention)


def weight_files(folder: str) -> dict[str, str]:
    """Tensor name → file in the folder.

    Raises:
        ModelError: there are no safetensors, or their index is damaged.
    """
    index, single = os.path.join(folder, INDEX), os.path.join(folder, SINGLE)
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as stream:
                return dict(json.load(stream)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(index, error) from error
    if os.path.exists(single):
        with _opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)
    raise ModelError(
        f"model.path {folder!r} holds no weights: neither {SINGLE} nor {INDEX}",
        ["save the model with save_pretrained(); pickled pytorch_model.bin files are not loaded"],
    )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A safetensors file; what is wrong inside it becomes an error that names it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> ModelError:
    return ModelError(f"{path} is damaged: {error}", ["fetch the folder again: a file may be incomplete"])


def stored_names(model: PreTrainedModel) -> set[str]:
    """What a complete checkpoint of the model holds: parameters and persistent buffers by name, tied ones once."""
    names = {stored for name, _ in model.named_parameters() if (stored := stored_name(name)) is not None}
    return (names | _persistent_buffers(model).keys()) - set(model.all_tied_weights_keys)


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def stored_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name in memory → key in a checkpoint, for each of its `keys`.

    Vision-language checkpoints are published in an older layout (``language_model.model.*``), saved in it again, and
    held in memory in another (``model.language_model.*``); the rules are those of transformers.

    Raises:
        ModelError: the checkpoint holds tensors that transformers would put together or take apart.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model, add_legacy=False)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    # A checkpoint in the layout of memory has nothing to rename, and some rules would fire twice.
    known = stored_names(model) | set(model.all_tied_weights_keys)
    found = {}
    for key in keys:
        name, converted = (key, None) if key in known else rename_source_key(key, renamings, converters)
        if converted is not None:
            raise ModelError(
                f"{key} of a {type(model).__name__} is stored in another form than it is trained in, which is not done",
                ["name the folder that save_pretrained(folder, save_original_format=False) writes of the loaded model"],
            )
        found[name] = key
    return found


def check_keys(expected: set[str], found: set[str], tied: set[str], folder: str) -> None:
    """Refuse a checkpoint that lacks a tensor of the model or has one more.

    Raises:
        ModelError: naming the first few of either.
    """
    missing, unexpected = sorted(expected - found), sorted(found - expected - tied)
    if not (missing or unexpected):
        return
    faults = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    ways_out = [
        "fetch the folder again: a file may be incomplete",
        "check that config.json belongs to these weights (architectures, model_type, num_hidden_layers)",
    ]
    if any("language_model." in name for name in unexpected):
        ways_out.append(
            "the weights are a vision-language model's: its config.json has a text_config and a vision_config"
        )
    elif any("language_model." in name for name in missing):
        ways_out.append(
            "the weights are a language model's alone: its config.json has model_type gemma3_text or the like"
        )
    raise ModelError(
        f"the weights in {folder!r} do not fit its config.json: {' and '.join(faults)} of {len(expected)} tensors",
        ways_out,
    )


def allocate(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model on the meta device memory, whole and without values, for `fill`."""
    model.to_empty(device=device)
    model.tie_weights()


@torch.no_grad()
def fill(model: PreTrainedModel, folder: str, spans: Mapping[str, Span]) -> None:
    """Give a model its weights, in place; its tensors are allocated but hold nothing yet.

    Only what the spans hold is read, a block of rows at a time. 4-bit layers are quantized as they are read; an
    adapter's own parameters are left as they are. Buffers that no checkpoint holds (rotary frequencies, Gemma's
    embedding scale) are computed.

    Args:
        spans: this worker's run of each parameter, by its name in memory.

    Raises:
        ModelError: a key is missing, unexpected, or of another shape, or a file is damaged.
    """
    files = weight_files(folder)
    keys = stored_keys(model, files)
    check_keys(stored_names(model), set(keys), set(model.all_tied_weights_keys), folder)
    targets: dict[str, Span | nn.Module] = {
        name: Span.whole(buffer) for name, buffer in _persistent_buffers(model).items()
    }
    packed = dict(quantize.layers(model))
    for name, span in spans.items():
        stored = stored_name(name)
        if stored is not None:
            targets[stored] = packed.get(name, span)
    by_file: dict[str, list[str]] = {}
    for name in targets:
        by_file.setdefault(files[keys[name]], []).append(name)
    for file, names in by_file.items():
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise ModelError(f"{path} is listed in {INDEX} but is not there", ["fetch the folder again"])
        with _opened(path) as tensors:
            for name in names:
                target = targets[name]
                if isinstance(target, Span):
                    _fill_one(target, tensors.get_slice(keys[name]), name, path)
                else:
                    quantize.store(target, tensors.get_tensor(keys[name]))
    _compute_buffers(model)


def _fill_one(span: Span, source: Any, name: str, path: str) -> None:
    if tuple(source.get_shape()) != span.shape:
        raise ModelError(
            f"{name} in {path} has shape {tuple(source.get_shape())}, config.json asks for {span.shape}",
            ["check that config.json belongs to these weights"],
        )
    if not span.shape:
        span.data.copy_(source[...].view(1))
        return
    if not span.data.numel():
        return
    row = span.numel // span.shape[0]
    rows = max(BLOCK // row, 1)
    for first in range(span.start // row, -(-span.stop // row), rows):
        read = source[first : first + rows].reshape(-1)
        start, stop = max(first * row, span.start), min(first * row + read.numel(), span.stop)
        span.data[start - span.start : stop - span.start].copy_(read[start - first * row : stop - first * row])


def _compute_buffers(model: PreTrainedModel) -> None:
    # The family's own initialisation computes them; marking what was loaded keeps it from touching anything else.
    for tensor in [*model.parameters(), *_persistent_buffers(model).values()]:
        tensor._is_hf_initialized = True
    model.initialize_weights()


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Precision in which the family's checkpoint is published; float32 where its config does not say."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
