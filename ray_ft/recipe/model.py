"""The model, and what of it is trained."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ray_ft import hub, paths
from ray_ft.recipe.section import Section

#: A commit of a hub's repository: the one name of a revision that its owner cannot give to something else.
COMMIT = re.compile(r"[0-9a-f]{40}")


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
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = None
    """Of a hub id: the commit, tag or branch to take; null: the newest of its main branch. A commit never changes."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder, with all rights of the training. Of a hub id only with a commit
    as revision: what is read through once is what runs."""
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
    labels: list[str] = []
    """Names of the labels, for sources of format labels: the model then gives each of them a probability."""

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, labels: object) -> object:
        if isinstance(labels, list) and (other := [one for one in labels if not isinstance(one, str)]):
            raise ValueError(
                f"{other[0]!r} is no name but {type(other[0]).__name__}, as YAML reads yes, no and numbers; write it "
                f'in quotes: "{other[0]}"'
            )
        return labels

    @field_validator("labels")
    @classmethod
    def _told_apart(cls, labels: list[str]) -> list[str]:
        if twice := sorted({name for name in labels if labels.count(name) > 1}):
            raise ValueError(f"{', '.join(map(repr, twice))} stands there twice; name each label once")
        if any(not name.strip() for name in labels):
            raise ValueError("a label's name is empty; give it one")
        if len(labels) == 1:
            raise ValueError(f"{labels[0]!r} alone leaves nothing to decide; name at least two")
        return labels

    @field_validator("path")
    @classmethod
    def _absolute_folder(cls, path: str) -> str:
        local = paths.absolute(path)  # a hub id looks like a relative path; only a folder that is there is one
        return local if os.path.isdir(local) else path

    @model_validator(mode="after")
    def _revision_is_pinned(self) -> Model:
        from_hub = not (os.path.isdir(self.path) or paths.is_uri(self.path))
        if self.revision and not from_hub:
            raise ValueError(
                f"revision: {self.revision} is one of the hub, and path: {self.path} is none of its ids; set revision: "
                "null, or path to a hub id"
            )
        if self.trust_remote_code and from_hub and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"trust_remote_code: true runs code of {self.path}, which its owner may change at any time while "
                f"revision is {self.revision or 'null'}; set revision to the 40 digits of a commit that you have read "
                f"(on the hub: Files, History), or trust_remote_code: false"
            )
        if self.trust_remote_code and paths.is_uri(self.path):
            raise ValueError(
                f"trust_remote_code: true is for a hub id with its commit, or a local folder, and path is {self.path}; "
                "copy the folder to storage that every node mounts, or set trust_remote_code: false"
            )
        return self

    @property
    def location(self) -> str:
        """What `hub.model_folder` takes: the path, of a hub id with the revision, as ``org/name@revision``."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def folder(self, *, weights: bool = True) -> str:
        """A local folder of the model, whose code may run in this process if the recipe trusts it.

        Raises:
            ModelError: as of `hub.model_folder`.
        """
        return hub.model_folder(self.location, weights=weights, code=self.trust_remote_code)

    @model_validator(mode="after")
    def _quantized_needs_adapter(self) -> Model:
        if self.quantize and self.adapter is None:
            raise ValueError(
                f"quantize: {self.quantize} freezes the base, so that without an adapter nothing is trained; "
                "add adapter: {name: lora}, or set quantize: null"
            )
        return self
