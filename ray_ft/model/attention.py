"""Which attention implementation trains a model, and why.

Packed documents are kept apart by position ids alone, so only implementations that honour them are offered:
FlashAttention 2 (by sequence lengths, see `loss`), and PyTorch's scaled dot-product, flex and eager attention (by a
block mask that transformers makes of the positions). Limits: layers without attention (state-space and linear ones) let
packed documents see each other whatever is chosen; train such families with ``data.packing: false``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ray_ft.errors import ModelError
from ray_ft.model import gemma3n
from ray_ft.model.load import model_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH = "flash_attention_2"
FLASH_HEAD_DIM = 256  # largest that its kernels have (flash-attn's README)
FLASH_GPU = (8, 0)  # oldest that they run on: Ampere (the same)


@dataclass(frozen=True)
class Choice:
    """transformers' name of the implementation, and one sentence that says which and why."""

    implementation: str
    reason: str


def choose(
    setting: str,
    device_type: str,
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    *,
    images: bool = False,
) -> Choice:
    """The implementation for the recipe's `model.attention`.

    Args:
        images: rows may have images, whose tokens see each other in both directions (of Gemma 3n: do not).
        dtype: precision of the computation; None: what is usual on the device, bfloat16 on GPUs.

    Raises:
        ModelError: one is asked for that does not work here.
    """
    dtype = dtype or (torch.bfloat16 if device_type == "cuda" else torch.float32)
    # Of masks it has the causal one alone, and transformers would take that for images without a word.
    both_ways = images and config.model_type != gemma3n.MODEL_TYPE  # whose images are read in order, as text is
    obstacle = "it has no mask in which the tokens of an image see each other" if both_ways else None
    obstacle = obstacle or _no_flash(device_type, config, dtype)
    if setting == "auto":
        if obstacle is None:
            return Choice(FLASH, "flash_attention_2: it is installed and fits the model")
        if no_sdpa := _no_sdpa(config):
            return Choice("eager", f"eager, not flash_attention_2: {obstacle}; not sdpa: {no_sdpa}")
        return Choice("sdpa", f"sdpa, not flash_attention_2: {obstacle}")
    obstacles = {FLASH: obstacle, "sdpa": _no_sdpa(config), "flex_attention": _no_flex(device_type, config)}
    if why := obstacles.get(setting):
        instead = choose("auto", device_type, config, dtype, images=images).implementation
        raise ModelError(
            f"model.attention = {setting!r} cannot be used: {why}",
            ["model.attention=auto takes what works and says why", f"model.attention={instead} works here"],
        )
    return Choice(setting, f"{setting}, as the recipe says")


def _no_flash(device_type: str, config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 2 cannot be used; None where it can."""
    if device_type != "cuda":
        return f"it needs a GPU, and the device is {device_type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed (pip install flash-attn --no-build-isolation)"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return "the installed flash_attn is too old for transformers, or not built for this GPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FLASH_GPU:
        return f"it needs an Ampere GPU or a newer one, and this is a {torch.cuda.get_device_name()}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, and the computation is in {str(dtype).removeprefix('torch.')}"
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim > FLASH_HEAD_DIM:
        return f"its heads have {head_dim} dimensions, over {FLASH_HEAD_DIM}"
    return _unsupported(config, "_supports_flash_attn")


def _no_sdpa(config: PretrainedConfig) -> str | None:
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        # transformers passes it on and its SDPA drops it: Gemma 2 would train with other scores than it answers with.
        return f"it leaves out the model's soft cap of attention scores (attn_logit_softcapping = {cap:g})"
    return _unsupported(config, "_supports_sdpa")


def _no_flex(device_type: str, config: PretrainedConfig) -> str | None:
    if device_type == "cpu":
        return "PyTorch's flex_attention has no backward pass on CPUs"
    if dropout := getattr(config.get_text_config(), "attention_dropout", 0.0):
        return f"it has no dropout, and the model has attention_dropout = {dropout:g}"
    return _unsupported(config, "_supports_flex_attn")


def _unsupported(config: PretrainedConfig, flag: str) -> str | None:
    if getattr(model_class(config), flag, False):
        return None
    return f"transformers has none for model_type {config.model_type!r}"
