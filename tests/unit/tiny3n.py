"""Tiny random Gemma 3n of the true classes, in folders as they are published.

timm is not installed where these tests run: `tower` puts two convolutions in place of what its `create_model` makes,
beneath transformers' own wrapper. Without it the model is built with no tower, as anywhere where timm is missing.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3nTextConfig,
    GenerationConfig,
    SiglipImageProcessorPil,
)
from transformers.models.timm_wrapper import modeling_timm_wrapper

from ray_ft.demo import base
from ray_ft.model import gemma3n

SIDE, PATCH, TOKENS = 32, 16, 4  # pixels of an image's side and of a patch's, and soft tokens of an image
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "altup_num_inputs": 3,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    "initializer_range": 0.2,
    "final_logit_softcapping": 3.0,  # small, so that logits reach it
}
MARKS = {
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>",
}  # fmt: skip
TEMPLATE = base.CHAT_TEMPLATE.replace(
    "{%- if item['type'] == 'text' -%}",
    "{%- if item['type'] == 'image' -%}{{ '<image_soft_token>' }}{%- elif item['type'] == 'text' -%}",
)


class Convolutions(nn.Module):
    """What stands for MobileNetV5: [images, 3, side, side] to [images, channels, side ÷ PATCH, side ÷ PATCH]."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, PATCH, PATCH)
        self.head = nn.Conv2d(channels, channels, 1)

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(pixels)))


def install(patch: Any = None) -> None:
    """Have transformers find a tower where it looks for timm's: until `patch` (pytest's) is undone, or for good."""
    change = patch.setattr if patch else lambda where, name, value, raising=True: setattr(where, name, value)
    timm = SimpleNamespace(create_model=lambda *_, **__: Convolutions(), __version__="0")
    change(modeling_timm_wrapper, "timm", timm, raising=False)
    change(modeling_timm_wrapper, "requires_backends", lambda *_: None)
    change(gemma3n, "missing", list)


def config(words: int = 64, **text: Any) -> Gemma3nConfig:
    """Of a vocabulary of `words`, behind which stand those of images and audio."""
    audio = {
        "hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "input_feat_size": 16,
        "sscp_conv_channel_size": [4, 4], "vocab_size": 4, "vocab_offset": words + 4,
    }  # fmt: skip
    return Gemma3nConfig(
        text_config={**TEXT, "vocab_size": words + 16, "vocab_size_per_layer_input": words, **text},
        vision_config={"hidden_size": 16, "vocab_size": 4, "vocab_offset": words},
        audio_config=audio,
        vision_soft_tokens_per_image=TOKENS,
        boi_token_id=words - 2, eoi_token_id=words, image_token_id=words + 1,
        boa_token_id=words - 1, eoa_token_id=words + 4, audio_token_id=words + 5,
    )  # fmt: skip


def text_config(words: int = 64, **text: Any) -> Gemma3nTextConfig:
    return Gemma3nTextConfig(**{**TEXT, "vocab_size": words + 16, "vocab_size_per_layer_input": words, **text})


def model(made: Any, seed: int = 0) -> Any:
    """With random weights, those that would be zeros or ones included."""
    torch.manual_seed(seed)
    kind = Gemma3nForCausalLM if isinstance(made, Gemma3nTextConfig) else Gemma3nForConditionalGeneration
    found = kind(made).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return found


def write(folder: Path, made: Any, seed: int = 0) -> str:
    """A folder as Google publishes it: with weights of keys and values for layers that borrow them."""
    written = model(made, seed)
    written.config.architectures = [type(written).__name__]
    written.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in list(tensors):
        for at in (2, 3):  # what layers 4 and 5 would have, were theirs not borrowed
            if f"layers.{at}.self_attn." in key and key.split(".")[-2] in gemma3n.BORROWED:
                tensors[key.replace(f"layers.{at}.", f"layers.{at + 2}.")] = tensors[key] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def write_base(folder: Path, texts: list[str], seed: int = 0) -> str:
    """The whole folder of a model that talks and sees, with tokenizer and processor."""
    tokenizer = base.make_tokenizer([*texts, "user", "model"], TEMPLATE)
    words = len(tokenizer) + 2
    begin, end, soft, first, last, audio = MARKS.values()
    tokenizer.add_tokens([begin, first, end, soft, "<unused0>", "<unused1>", last, audio], special_tokens=True)
    tokenizer._set_model_specific_special_tokens(MARKS)
    made = config(words)
    assert [tokenizer.convert_tokens_to_ids(one) for one in (begin, end, soft, first, last, audio)] == [
        made.boi_token_id, made.eoi_token_id, made.image_token_id, made.boa_token_id, made.eoa_token_id,
        made.audio_token_id,
    ]  # fmt: skip
    write(folder, made, seed)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=stops
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_normalize=False)
    Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), images, tokenizer, chat_template=TEMPLATE, image_seq_length=TOKENS
    ).save_pretrained(folder)
    return str(folder)
