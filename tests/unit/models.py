"""Folders of tiny random models of the true classes, as they are published: config.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB = 64
FAMILIES = ("gemma3_text", "gemma3", "llama", "qwen3")
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
GEMMA: dict[str, Any] = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,  # as Gemma 3 is published
}


def config(family: str, **settings: Any) -> PretrainedConfig:
    """Of ``gemma3_text`` (tied), ``gemma3`` (with a vision tower, tied), ``llama`` (untied) or ``qwen3`` (tied).

    Args:
        settings: of the language model.
    """
    if family == "gemma3":
        text = Gemma3TextConfig(**{**TEXT, **GEMMA, **settings})
        return Gemma3Config(
            text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4,
            image_token_index=60, boi_token_index=61, eoi_token_index=62,
        )  # fmt: skip
    if family == "gemma3_text":
        return Gemma3TextConfig(**{**TEXT, **GEMMA, **settings})
    if family == "llama":
        return LlamaConfig(**{**TEXT, "tie_word_embeddings": False, **settings})
    return Qwen3Config(**{**TEXT, "tie_word_embeddings": True, **settings})


def model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model with random weights, those that would be zeros or ones included."""
    torch.manual_seed(seed)
    made = config(family, **settings)
    auto = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    found = auto.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return found


def write(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, shards: str = "5GB", **settings: Any) -> str:
    """Write a model of `family` as published; returns the folder."""
    model(family, **settings).to(dtype).save_pretrained(folder, max_shard_size=shards)
    if family == "gemma3":  # transformers 5 leaves out a level that published checkpoints have
        rename(folder, lambda key: key.replace("vision_tower.", "vision_tower.vision_model."))
    return str(folder)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors in a folder other keys."""
    for file in folder.glob("*.safetensors"):
        save_file({change(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {change(key): file for key, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
