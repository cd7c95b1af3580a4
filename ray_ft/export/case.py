"""What a check looks at: an exported folder that is not published yet, and the run that it was made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ray_ft.export import lora
from ray_ft.export.reference import ROUNDOFF, Reference, Tolerance
from ray_ft.export.tensorfile import Entry, Reader, folder_entries
from ray_ft.export.vllm_process import Vllm
from ray_ft.export.weights import Plan
from ray_ft.model import load
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
        """The base's."""
        return load.load_config(self.trained.base)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base's, on the meta device. Of a config of its own, into which transformers writes another dtype."""
        return load.build(load.load_config(self.trained.base))

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
                found[file] = {key: one for key, one in base.entries.items() if self.plan.files.get(key) == file}
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
