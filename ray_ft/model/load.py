"""Hugging Face folder to module: built on the meta device, filled shard by shard, every key accounted for.

No process ever holds more than its own shard plus one tensor: parameters are laid out first (sharded or not), then each
is filled from the slice of the safetensors file that it needs. A missing or unexpected key stops the run, because
`from_pretrained` would only warn and train random weights.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from ray_ft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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


def build(config: PretrainedConfig, attention: str = "auto", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device: shapes and names, no memory.

    Raises:
        ModelError: it is more than a language model.
    """
    from transformers import AutoModelForCausalLM

    if config.get_text_config() is not config:
        raise ModelError(
            f"model_type {config.model_type!r} is a language model with other parts (such as a vision tower), "
            "which are not trained yet",
            ["name a text model, such as google/gemma-3-1b-it", "or save the language model alone in a folder"],
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa" if attention == "auto" else attention
        )


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


def stored_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a complete checkpoint of the model holds: parameters and persistent buffers by name, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


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
    raise ModelError(
        f"the weights in {folder!r} do not fit its config.json: {' and '.join(faults)} of {len(expected)} tensors",
        [
            "fetch the folder again: a file may be incomplete",
            "check that config.json belongs to these weights (architectures, model_type, num_hidden_layers)",
        ],
    )


@torch.no_grad()
def fill(model: PreTrainedModel, folder: str) -> None:
    """Give a model its weights, in place; its tensors are allocated (`to_empty`) but hold nothing yet.

    Parameters may be plain tensors or DTensors sharded along dimension 0; of the latter only the local rows are read.
    Buffers that no checkpoint holds (rotary frequencies, Gemma's embedding scale) are computed.

    Raises:
        ModelError: a key is missing, unexpected, or of another shape, or a file is damaged.
    """
    model.tie_weights()
    files = weight_files(folder)
    wanted = stored_names(model)
    check_keys(set(wanted), set(files), set(model.all_tied_weights_keys), folder)
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise ModelError(f"{path} is listed in {INDEX} but is not there", ["fetch the folder again"])
        with _opened(path) as tensors:
            for name in names:
                _fill_one(wanted[name], tensors.get_slice(name), name, path)
    _compute_buffers(model)


def _fill_one(target: torch.Tensor, source: Any, name: str, path: str) -> None:
    if tuple(source.get_shape()) != tuple(target.shape):
        raise ModelError(
            f"{name} in {path} has shape {tuple(source.get_shape())}, config.json asks for {tuple(target.shape)}",
            ["check that config.json belongs to these weights"],
        )
    if not isinstance(target, DTensor):
        target.copy_(source[:] if target.dim() else source[...])
        return
    start, stop = local_rows(target)
    if start < stop:
        target.to_local().copy_(source[start:stop])


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """Rows [start, stop) of dimension 0 that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


def _compute_buffers(model: PreTrainedModel) -> None:
    # The family's own initialisation computes them; marking what was loaded keeps it from touching anything else.
    for tensor in [*model.parameters(), *stored_names(model).values()]:
        tensor._is_hf_initialized = True
    model.initialize_weights()


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Precision in which the family's checkpoint is published; float32 where its config does not say."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
