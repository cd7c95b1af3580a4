"""Tiny random models of the true classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, LlamaConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(family: str, layers: int = 2) -> Any:
    """Of ``llama`` (untied), ``gemma3_text`` (tied), or ``gemma3`` (with a vision tower)."""
    sizes = {**SIZES, "num_hidden_layers": layers}
    if family == "llama":
        return LlamaConfig(**sizes, tie_word_embeddings=False)
    if family == "gemma3_text":
        return Gemma3TextConfig(**sizes)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config=Gemma3TextConfig(**sizes).to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )


def meta(family: str, layers: int = 2) -> Any:
    """A model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(family, layers), dtype=torch.float32)


def filled(family: str, layers: int = 2) -> Any:
    """A model with random weights, the same at each call; no row of a weight is all ones or zeros."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config(family, layers), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
