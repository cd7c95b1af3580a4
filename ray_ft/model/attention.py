"""Which attention implementation trains a model, and why.

Packed documents are kept apart by position ids alone, so only implementations that honour them are offered:
FlashAttention 2 (by sequence lengths), and PyTorch's scaled dot-product, flex and eager attention (by a block mask that
transformers makes of the positions).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_ft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH = "flash_attention_2"
FLASH_HEAD_DIM = 256  # largest that its kernels have (flash-attn's README)


@dataclass(frozen=True)
class Choice:
    """transformers' name of the implementation, and one sentence that says which and why."""

    implementation: str
    reason: str


def choose(setting: str, device_type: str, config: PretrainedConfig) -> Choice:
    """The implementation for the recipe's `model.attention`.

    Raises:
        ModelError: one is asked for that does not work here.
    """
    obstacle = _obstacle(device_type, config)
    if setting == "auto":
        if obstacle is None:
            return Choice(FLASH, "flash_attention_2: it is installed and fits the model")
        return Choice("sdpa", f"sdpa, not flash_attention_2: {obstacle}")
    if setting == FLASH and obstacle:
        raise ModelError(
            f"model.attention = {setting!r} cannot be used: {obstacle}",
            ["model.attention=auto takes what works and says why", "model.attention=sdpa works everywhere"],
        )
    return Choice(setting, f"{setting}, as the recipe says")


def _obstacle(device_type: str, config: PretrainedConfig) -> str | None:
    """Why FlashAttention 2 cannot be used; None where it can."""
    if device_type != "cuda":
        return f"it needs a GPU, and the device is {device_type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed (pip install flash-attn --no-build-isolation)"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return "the installed flash_attn is too old for transformers, or not built for this GPU"
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim > FLASH_HEAD_DIM:
        return f"its heads have {head_dim} dimensions, over {FLASH_HEAD_DIM}"
    return None
