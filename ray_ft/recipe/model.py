"""The model, and what of it is trained."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ray_ft import paths
from ray_ft.recipe.section import Section


class Adapter(Section):
    """Low-rank adapters: the base stays as it is, small matrices beside its linear layers are trained."""

    name: Literal["lora", "rslora", "dora"] = "lora"
    """lora; rslora: scaled by alpha ÷ √rank; dora: direction and magnitude apart."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Inner dimension of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapter: alpha ÷ rank (rslora: alpha ÷ √rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of inputs to the adapter that is dropped while training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """all-linear: every linear layer but the output projection; or patterns (*, ?) of module names: "*q_proj"."""
    exclude_modules: list[str] = ["*vision*", "*audio*", "*multi_modal_projector*"]
    """Patterns of module names that get no adapter; the default leaves towers that read no text alone."""


class Model(Section):
    path: str
    """Hugging Face model: a local folder, a URI, or a hub id such as google/gemma-3-1b-it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation and of frozen weights; auto: bfloat16 on GPU, float32 on CPU."""
    attention: Literal["auto", "flash_attention_2", "flex_attention", "sdpa", "eager"] = "auto"
    """Attention implementation; auto: flash_attention_2 where it is usable, else sdpa; the run says which and why."""
    freeze: list[str] = []
    """What is not trained: input_embeddings, output_embeddings, vision_tower, audio_tower, language_model, or patterns
    (*, ?) of parameter names, such as "*embed_tokens*"."""
    unfreeze: list[str] = []
    """What is trained although freeze, or an adapter's frozen base, covers it; written like freeze."""
    adapter: Adapter | None = None
    """Train low-rank adapters in place of the weights; null: train the weights."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen base in 4-bit NF4 (QLoRA); needs an adapter and a GPU."""

    @field_validator("path")
    @classmethod
    def _absolute_folder(cls, path: str) -> str:
        local = paths.absolute(path)  # a hub id looks like a relative path; only a folder that is there is one
        return local if os.path.isdir(local) else path

    @model_validator(mode="after")
    def _quantized_needs_adapter(self) -> Model:
        if self.quantize and self.adapter is None:
            raise ValueError(
                f"quantize: {self.quantize} freezes the base, so that without an adapter nothing is trained; "
                "add adapter: {name: lora}, or set quantize: null"
            )
        return self
