"""The trained model of a run, put together in one process: the base's weights with the newest checkpoint over them,
and the adapter, where there is one, beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ray_ft import artifacts, paths, recipe
from ray_ft.data.prepare import Prepared, Split
from ray_ft.data.prepare import load as load_prepared
from ray_ft.errors import CheckpointError
from ray_ft.model import adapt, adapter, attention, load, quantize
from ray_ft.span import Span
from ray_ft.train import checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


#: Of names of parameters in a checkpoint.
SECTION = "model/"


@dataclass(frozen=True)
class Trained:
    """Where a run stands: its directory (which may have been moved since), its recipe, its newest valid checkpoint, and
    the local folder of its base model."""

    run: artifacts.RunDir
    recipe: recipe.Recipe
    found: checkpoint.Found
    base: str

    @classmethod
    def of(cls, run: str) -> Trained:
        """Look a run directory up; a sweep's stands for its best trial's.

        Raises:
            CheckpointError: there is no such run, or it has no committed checkpoint yet.
        """
        directory = artifacts.RunDir(paths.absolute(artifacts.run_of(run)))
        if not paths.exists(directory.recipe):
            raise CheckpointError(
                f"{run!r} is no run directory: it has no recipe.yaml",
                ["name <run.storage>/<run.name>, as `ray-ft train` printed it", "train first: ray-ft train RECIPE"],
            )
        settings = recipe.load(directory.recipe)
        found = checkpoint.newest(directory.checkpoints)
        if found is None:
            raise CheckpointError(
                f"{run!r} has no committed checkpoint",
                ["train first: ray-ft train RECIPE", "a checkpoint is written every train.checkpoint.every steps"],
            )
        return cls(directory, settings, found, settings.model.folder())

    @property
    def labels(self) -> list[str]:
        """Of a classifier, by number; none of a language model."""
        return self.recipe.model.labels

    def config(self) -> PretrainedConfig:
        """Of the model that is trained, read anew: the base's, or that of a classifier on top of it."""
        return load.load_config(self.base, self.labels)

    def trained_names(self) -> set[str]:
        """Parameters that the checkpoint holds, an adapter's included; all others are the base's."""
        names = checkpoint.index(self.found.location)
        return {name.removeprefix(SECTION) for name in names if name.startswith(SECTION)}

    def read(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill some of `trained_names`, in place; each is converted to the dtype of the tensor given."""
        spans = {SECTION + name: Span.whole(tensor) for name, tensor in tensors.items()}
        checkpoint.restore(self.found.location, spans, partial=True)

    def prepared(self, split: Split) -> Prepared | None:
        """The packed rows that the run was trained or evaluated on; None where it had no such data.

        Raises:
            CheckpointError: they are gone.
        """
        stats = paths.read_json(self.run.stats)
        if split not in stats:
            return None
        location = stats[split]["location"]
        # Where a whole storage was moved, the rows lie beside the run as before.
        beside = paths.join(paths.parent(self.run.root), "_prepared", paths.base_name(location))
        for place in (location, beside):
            if found := load_prepared(place, self.recipe, split, self.base):
                return found
        raise CheckpointError(
            f"the prepared rows of {self.run.root} are gone from {location}",
            ["prepare them again: ray-ft train RECIPE goes through the data first and then finds the run trained"],
        )

    @property
    def image_tokens(self) -> int:
        """Soft tokens of an image, where the base sees."""
        config: Any = load.load_config(self.base)
        return int(
            config.vision_soft_tokens_per_image if config.model_type == "gemma3n" else config.mm_tokens_per_image
        )

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The whole trained model on one device, its adapter beside the base, ready to answer.

        Where the base was trained in 4 bits, it is held so on a GPU; elsewhere in `dtype`, with the same values.

        Raises:
            CheckpointError: the checkpoint and the recipe's model do not hold the same adapter and parameters.
        """
        config, settings = self.config(), self.recipe.model
        # What it was trained with may not run here: an export or evaluation on CPUs of what GPUs have trained.
        images = self.recipe.data.images is not None
        chosen = attention.choose("auto", device.type, config, dtype, images=images)
        model = load.build(config, chosen.implementation, dtype)
        adapted = adapt.adapt(model, settings, dtype, dtype, packed=device.type == "cuda", images=images)
        load.allocate(model, device)
        load.fill(model, self.base, load.whole_spans(model))
        names = self.trained_names()
        trained = {}
        for name, parameter in model.named_parameters():
            stored = adapter.stored_name(name)
            if stored in adapted.quantized and device.type != "cuda":
                parameter.data.copy_(quantize.rounded(parameter.data, dtype))
            if stored is None or name in names:
                trained[SECTION + name] = Span.whole(parameter)
        checkpoint.restore(self.found.location, trained)
        return model.eval()
