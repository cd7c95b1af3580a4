"""Hugging Face folder to module: built on the meta device, filled shard by shard, every key accounted for.

No process ever holds more than its own shard plus one block: parameters are laid out first (sharded or not), then each
is filled from the rows of the safetensors file that it needs. A missing or unexpected key stops the run, because
`from_pretrained` would only warn and train random weights.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_ft import hub
from ray_ft.errors import ModelError
from ray_ft.lean import without_unused
from ray_ft.model import classify, gemma3n, quantize
from ray_ft.model.adapter import stored_name
from ray_ft.span import Span

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Key of a checkpoint's state: the `fingerprint` of the base that it was trained from.
FINGERPRINT = "base_sha256"

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: What older checkpoints hold although it is computed; transformers passes over it too.
COMPUTED = ("rotary_emb.inv_freq", "position_ids")
BLOCK = 1 << 25  # elements that are read at once
SAMPLE = 4096  # bytes of each tensor that enter a fingerprint


def load_config(folder: str, labels: Sequence[str] = ()) -> PretrainedConfig:
    """The model's config. Where the recipe trusts the folder's own code, its classes are known to transformers then,
    in this process, as those of its own families are.

    Args:
        labels: of the classifier that the model is to be, on top of a language model or as one that there is already;
            none: it is to be a language model.

    Raises:
        ModelError: config.json is missing, broken, or of a family that transformers does not know; or it names code
            that its recipe does not trust, or that lies elsewhere; or it is a classifier, and not of these labels.
    """
    config = _read_config(folder)
    if labels:
        return classify.labelled(config, labels, folder)
    if classify.is_classifier(config):
        names = classify.labels_of(config)
        raise ModelError(
            f"{folder!r} is a classifier of {', '.join(names[:3])}{' …' if len(names) > 3 else ''}, which gives "
            "probabilities of labels and no text",
            ["ask it for labels: ray-ft serve, then POST /v1/classify", "or name a language model"],
        )
    return config


def _read_config(folder: str) -> PretrainedConfig:
    without_unused()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    code = _own_code(folder)
    trusted = hub.runs_code(folder)
    if code and trusted:
        _refuse_foreign_code(folder, code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        if code and trusted:
            _register(config, code, folder)
        return config
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if code and not trusted:
            raise ModelError(
                f"the model in {folder!r} is made by Python code of its own ({', '.join(sorted(code.values()))}), "
                "which is not run: model.trust_remote_code is false",
                [
                    "read the code, then set model.trust_remote_code=true, and model.revision to that commit",
                    "use a model of a family that transformers knows",
                ],
            ) from error
        raise ModelError(
            f"model.path {folder!r} has no usable config.json: {str(error).splitlines()[0]}",
            ["name the folder that holds config.json, the tokenizer and *.safetensors"],
        ) from error


def _own_code(folder: str) -> dict[str, str]:
    """What config.json and tokenizer_config.json ask of code: auto class → file.Class, as ``auto_map`` has them."""
    found: dict[str, str] = {}
    for name in ("config.json", "tokenizer_config.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as stream:
                auto_map = json.load(stream).get("auto_map") or {}
            for auto, where in auto_map.items():
                found[auto] = next(filter(None, where)) if isinstance(where, list) else where
        except (OSError, ValueError, AttributeError, StopIteration):
            continue  # what reads the file for its own sake says what is wrong with it
    return found


def _refuse_foreign_code(folder: str, code: Mapping[str, str]) -> None:
    """``other/repository--file.Class`` would run what that repository holds today: no revision of ours pins it."""
    if foreign := sorted(where for where in code.values() if "--" in where):
        raise ModelError(
            f"the model in {folder!r} takes code from another repository, {foreign[0].split('--')[0]}, which "
            "model.revision does not pin",
            ["copy the model and that code into a folder of your own, and name them in its auto_map"],
        )


def _register(config: PretrainedConfig, code: Mapping[str, str], folder: str) -> None:
    """Make a folder's own classes known, so that all that takes a config finds the model, as for any family."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = type(config)
    if "AutoConfig" not in code or "AutoModelForCausalLM" not in code or own in AutoModelForCausalLM._model_mapping:
        return
    AutoConfig.register(config.model_type, own, exist_ok=True)
    AutoModelForCausalLM.register(own, get_class_from_dynamic_module(code["AutoModelForCausalLM"], folder))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that computes logits for text, or a classifier's that computes scores of labels.

    A config with parts besides its language model (such as a vision tower) gives the class that has them all: the
    language model's class alone would not find its weights in such a checkpoint.

    Raises:
        ModelError: transformers has none, such as for encoders.
    """
    mapping = _factory(config)._model_mapping
    if getattr(config, "is_encoder_decoder", False) or type(config) not in mapping:
        raise ModelError(
            f"model_type {config.model_type!r} has no causal language model in transformers",
            ["name a decoder, such as google/gemma-3-1b-it, or one with a vision tower, such as google/gemma-3-4b-it"],
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _factory(config: PretrainedConfig) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if classify.is_classifier(config):
        return AutoModelForSequenceClassification
    several = config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if several else AutoModelForCausalLM


def build(config: PretrainedConfig, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device, of `model_class`: shapes and names, no memory.

    Args:
        attention: an implementation of transformers', as `attention.choose` names it.

    Raises:
        ModelError: the family has no causal language model.
    """
    model_class(config)
    config = buildable(config)
    implementation: str | dict[str, str] = attention
    if config.model_type == gemma3n.MODEL_TYPE:  # timm's tower attends as it likes, and is refused with any but these
        implementation = {"": attention, "text_config": attention, "vision_config": "sdpa", "audio_config": "sdpa"}
    with torch.device("meta"):
        return _factory(config).from_config(config, dtype=dtype, attn_implementation=implementation)


def buildable(config: PretrainedConfig) -> PretrainedConfig:
    """A copy, since transformers writes into the one that it is given; of Gemma 3n less a tower that cannot be had."""
    config = copy.deepcopy(config)
    if gemma3n.misses_tower(config):
        gemma3n.without_tower(config)
    return config


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


def fingerprint(folder: str) -> str:
    """What tells a folder's weights from others: a sha256 over the headers of its files and the first `SAMPLE` bytes of
    each tensor, so that a few MiB are read of a model of any size. A change behind them alone goes unseen.

    Raises:
        ModelError: there are no safetensors, or a file is damaged.
    """
    digest = hashlib.sha256()
    for file in sorted(set(weight_files(folder).values())):
        path = os.path.join(folder, file)
        try:
            with open(path, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > os.path.getsize(path):
                    raise ValueError("its header is cut short")
                header = stream.read(length)
                digest.update(file.encode() + b"\0" + header)
                entries = json.loads(header)
                entries.pop("__metadata__", None)
                for start, stop in sorted(one["data_offsets"] for one in entries.values()):
                    stream.seek(8 + length + start)
                    digest.update(stream.read(min(SAMPLE, stop - start)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
    return digest.hexdigest()


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
        ModelError: the checkpoint holds tensors that transformers would put together or take apart, or one twice.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model, add_legacy=False)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    # A checkpoint in the layout of memory has nothing to rename, and some rules would fire twice.
    known = stored_names(model) | set(model.all_tied_weights_keys)
    found: dict[str, str] = {}
    for key in keys:
        name, converted = (key, None) if key in known else rename_source_key(key, renamings, converters)
        if converted is not None:
            raise ModelError(
                f"{key} of a {type(model).__name__} is stored in another form than it is trained in, which is not done",
                ["name the folder that save_pretrained(folder, save_original_format=False) writes of the loaded model"],
            )
        if name in found:
            raise ModelError(
                f"the checkpoint holds {name} twice, as {found[name]} and as {key}",
                ["fetch the folder again into an empty one: two layouts may be mixed"],
            )
        found[name] = key
    return found


def check_keys(expected: set[str], found: set[str], tied: set[str], folder: str) -> None:
    """Refuse a checkpoint that lacks a tensor of the model or has one more.

    Raises:
        ModelError: naming the first few of either.
    """
    missing = sorted(expected - found)
    unexpected = sorted(name for name in found - expected - tied if not name.endswith(COMPUTED))
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


def whole_spans(model: nn.Module) -> dict[str, Span]:
    """The spans of a model that is not sharded, for `fill`."""
    return {name: Span.whole(parameter) for name, parameter in model.named_parameters()}


@torch.no_grad()
def fill(model: PreTrainedModel, folder: str, spans: Mapping[str, Span]) -> None:
    """Give a model its weights, in place; its tensors are allocated but hold nothing yet.

    Only what the spans hold is read, a block of rows at a time. 4-bit layers are quantized as they are read; an
    adapter's own parameters are left as they are, and a new classifier's last layer begins with zeros. Buffers that no
    checkpoint holds (rotary frequencies, Gemma's embedding scale) are computed.

    Args:
        spans: this worker's run of each parameter, by its name in memory.

    Raises:
        ModelError: a key is missing, unexpected, or of another shape, a file is damaged, or what is tied in the model
            has two values.
    """
    files = weight_files(folder)
    keys = stored_keys(model, files)
    new = classify.new_names(model, keys)
    passed_over = {*model.all_tied_weights_keys, *([classify.WORDS] if classify.is_classifier(model.config) else [])}
    passed_over |= gemma3n.passed_over(model, keys)
    check_keys(stored_names(model) - new, set(keys), passed_over, folder)
    classify.initialise(spans, new)
    targets: dict[str, Any] = {name: Span.whole(buffer) for name, buffer in _persistent_buffers(model).items()}
    packed = dict(quantize.layers(model))
    for name, span in spans.items():
        stored = stored_name(name)
        if stored is not None and stored not in new:
            targets[stored] = packed.get(name, span)
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if name in keys}
    targets |= {name: targets[source] for name, source in tied.items()}
    by_file: dict[tuple[bool, str], list[str]] = {}
    for name in targets:  # duplicates of tied tensors last: they are compared with what has been read
        by_file.setdefault((name in tied, files[keys[name]]), []).append(name)
    for (duplicate, file), names in sorted(by_file.items()):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise ModelError(f"{path} is listed in {INDEX} but is not there", ["fetch the folder again"])
        with _opened(path) as tensors:
            for name in names:
                target, source = targets[name], tensors.get_slice(keys[name])
                if not isinstance(target, Span):
                    _check_shape(source, (target.out_features, target.in_features), name, path)
                    quantize.store(target, source[:])
                    continue
                for run, read in _runs(target, source, name, path):
                    if not duplicate:
                        run.copy_(read)
                    elif not torch.equal(run, read.to(run)):
                        raise _untied(name, tied[name], path)
    compute_buffers(model)


def _check_shape(source: Any, shape: tuple[int, ...], name: str, path: str) -> None:
    if tuple(source.get_shape()) != shape:
        raise ModelError(
            f"{name} in {path} has shape {tuple(source.get_shape())}, config.json asks for {shape}",
            ["check that config.json belongs to these weights"],
        )


def _runs(span: Span, source: Any, name: str, path: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(A run of the span, the same elements as stored), of some rows of the file at a time."""
    _check_shape(source, span.shape, name, path)
    if not span.shape and span.data.numel():
        yield span.data, source[...].view(1)
    if not span.shape or not span.data.numel():
        return
    row = span.numel // span.shape[0]
    rows, last = max(BLOCK // row, 1), -(-span.stop // row)
    for first in range(span.start // row, last, rows):
        read = source[first : min(first + rows, last)].reshape(-1)
        start, stop = max(first * row, span.start), min(first * row + read.numel(), span.stop)
        yield span.data[start - span.start : stop - span.start], read[start - first * row : stop - first * row]


def _untied(name: str, source: str, path: str) -> ModelError:
    return ModelError(
        f"{name} in {path} differs from {source}, and config.json says that they are one tensor",
        ["set tie_word_embeddings to false in config.json, if they were trained apart"],
    )


def compute_buffers(model: PreTrainedModel) -> None:
    """Give a model whose parameters are filled the buffers that no checkpoint holds; nothing else is touched."""
    # The family's own initialisation computes them; marking what was loaded keeps it from touching anything else.
    for tensor in [*model.parameters(), *_persistent_buffers(model).values()]:
        tensor._is_hf_initialized = True
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # left by an earlier call, whose buffers may be gone
    model.initialize_weights()


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Precision in which the family's checkpoint is published; float32 where its config does not say."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
