"""The trained model of a run, put together in one process: the base's weights with the newest checkpoint over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ray_ft import paths, recipe
from ray_ft.data.prepare import Prepared, Split
from ray_ft.data.prepare import load as load_prepared
from ray_ft.errors import CheckpointError
from ray_ft.model import load
from ray_ft.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trained:
    """Where a run stands: its directory (which may have been moved since), its recipe, its newest valid checkpoint, and
    the local folder of its base model."""

    run: paths.RunDir
    recipe: recipe.Recipe
    found: checkpoint.Found
    base: str

    @classmethod
    def of(cls, run: str) -> Trained:
        """Look a run directory up.

        Raises:
            CheckpointError: there is no such run, or it has no committed checkpoint yet.
        """
        directory = paths.RunDir(paths.absolute(run))
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
        return cls(directory, settings, found, paths.model_folder(settings.model.path))

    def trained_names(self) -> set[str]:
        """Parameters that the checkpoint holds; all others are the base's."""
        prefix = "model."
        names = checkpoint.read_metadata(self.found.location)
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    def read(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill some of `trained_names`, in place; each is converted to the dtype of the tensor given."""
        checkpoint.restore(self.found.location, {"model": tensors}, world=1, partial=True)

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
            if found := load_prepared(place):
                return found
        raise CheckpointError(
            f"the prepared rows of {self.run.root} are gone from {location}",
            ["prepare them again: ray-ft train RECIPE goes through the data first and then finds the run trained"],
        )

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The whole trained model on one device, ready to answer."""
        model = load.build(load.load_config(self.base), self.recipe.model.attention, dtype)
        model.to_empty(device=device)
        load.fill(model, self.base)
        names = self.trained_names()
        self.read({name: parameter.data for name, parameter in model.named_parameters() if name in names})
        return model.eval()
