"""What a check looks at: an exported folder that is not published yet, and the run that it was made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ray_ft import paths
from ray_ft.data.render import load_tokenizer
from ray_ft.export import lora
from ray_ft.export.reference import ROUNDOFF, Reference, Tolerance
from ray_ft.export.tensorfile import Entry, Reader, folder_entries
from ray_ft.export.vllm_process import Vllm
from ray_ft.export.weights import Plan
from ray_ft.model import classify, load
from ray_ft.trained import Trained


@dataclass
class Case:
    """One export before the gate. What is read or computed is kept for the checks that follow.

    Attributes:
        folder: what was written, local.
        vllm: the process to ask, or why none is asked.
    """

    trained: Trained
    folder: str
    vllm: Vllm | str = "not asked"

    @cached_property
    def kind(self) -> Literal["model", "adapter"]:
        return "adapter" if os.path.exists(os.path.join(self.folder, lora.CONFIG)) else "model"

    @cached_property
    def config(self) -> PretrainedConfig:
        """The trained model's: the base's, or that of a classifier on top of it."""
        return self.trained.config()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The trained one, on the meta device. Of a config of its own, into which transformers writes another dtype."""
        return load.build(self.trained.config())

    @cached_property
    def parameters(self) -> int:
        """Elements of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which the model is published, and answers are compared."""
        return load.stored_dtype(self.config)

    @cached_property
    def plan(self) -> Plan:
        return Plan.of(self.trained)

    @cached_property
    def expected(self) -> dict[str, dict[str, Entry]]:
        """File → key → what is to be there."""
        if self.kind == "adapter":
            return {lora.WEIGHTS: {key: entry for key, (_, entry) in lora.entries(self.trained).items()}}
        found = {}
        for file in sorted(set(self.plan.files.values())):
            with Reader(os.path.join(self.trained.base, file)) as base:
                found[file] = self.plan.entries(file, base)
        return found

    @cached_property
    def found(self) -> dict[str, dict[str, Entry]]:
        """File → key → what is there.

        Raises:
            ModelError: a file is damaged.
        """
        return folder_entries(self.folder)

    @cached_property
    def reference(self) -> Reference:
        """Computed at first use, by the whole trained model."""
        return Reference.of(self.trained, self.dtype)

    @property
    def tolerance(self) -> Tolerance:
        """Of the coarsest precision in play: some bases are stored in bfloat16 under a config that says float32."""
        stored = {entry.dtype for entries in self.expected.values() for entry in entries.values()}
        coarsest = max(ROUNDOFF.keys() & {*stored, self.dtype}, key=ROUNDOFF.__getitem__)
        return Tolerance.of(coarsest, self.config.get_text_config().num_hidden_layers)


def config_of(trained: Trained) -> dict[str, Any]:
    """What config.json is to say: what the base's says, and of a classifier its class, labels and padding."""
    content: dict[str, Any] = paths.read_json(os.path.join(trained.base, "config.json"))
    if not trained.labels:
        return content
    said = classify.settings(trained.config(), trained.labels)
    content |= {**said, "id2label": {str(number): name for number, name in said["id2label"].items()}}
    # By it transformers tells where each text of a batch ends. With parts, the language model's is the one that counts.
    text = content.get("text_config", content)
    if trained.config().get_text_config().pad_token_id is None:
        tokenizer = load_tokenizer(trained.base)
        text["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return content
