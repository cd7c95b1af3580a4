"""The base model's log-probabilities of the answers in preference rows, computed once, before training.

Ray Data spreads the rows over actors that each hold the base, one on each GPU (one in all on CPU), unit by unit; what
an interrupted command has finished is not computed again. Limits: an actor that is lost ends the command, and the same
command goes on; the whole base is on one device, in the precision of the run. A base too large for that is tuned with
an adapter, which is switched off in place of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ray_ft import placement
from ray_ft.data import references, stream
from ray_ft.data.prepared import Prepared, Unit
from ray_ft.errors import ResourceError, first_line
from ray_ft.model import load
from ray_ft.model.preference import PreferenceLoss
from ray_ft.model.whole import whole
from ray_ft.recipe import Recipe
from ray_ft.train import objective
from ray_ft.train.cluster import compute_dtype
from ray_ft.train.loop import micro_batches

SWITCHED_OFF = "reference: the base, by switching the adapter off in a second forward pass of every step"


def with_references(
    prepared: Prepared,
    recipe: Recipe,
    *,
    gpus: int | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """The rows, with what the recipe's base says of them; computed where it is not there yet.

    Args:
        gpus: of the connected cluster, 0: one actor on its CPUs; None: in this process, on what it trains on.
        on_progress: called with (units done, units in all).

    Raises:
        ModelError: the base cannot be loaded.
        ResourceError: it does not fit one device.
    """
    cuda = recipe.train.device != "cpu" and (torch.cuda.is_available() if gpus is None else gpus > 0)
    dtype = compute_dtype(recipe, cuda)
    model = {"weights": load.fingerprint(recipe.model.folder()), "dtype": str(dtype)}
    location = references.location_of(prepared, model)
    if found := references.find(location):
        return replace(prepared, references=found)
    work = _Reference(prepared, recipe, location, "cuda" if cuda else "cpu", dtype)
    units = list(prepared.units)
    widths: Iterable[int]
    if gpus is None:
        widths = map(work, units)
    else:
        widths = stream.spread_over_actors(work, units, actors=max(gpus, 1), gpus=1 if cuda else 0)
    documents = 0
    for done, width in enumerate(widths, start=1):
        documents = max(documents, width)
        on_progress(done, len(units))
    return replace(prepared, references=references.commit(location, documents, model))


def gpus_for(recipe: Recipe) -> int:
    """GPUs of the connected cluster that may be used: no more than the run itself has."""
    return min(placement.gpus_within_reach(), recipe.train.world_size) if recipe.train.device != "cpu" else 0


@dataclass
class _Reference:
    """Computes and keeps those of one unit, and returns how many documents lie in a row at most."""

    prepared: Prepared
    recipe: Recipe
    location: str
    device: str
    dtype: torch.dtype
    _module: PreferenceLoss | None = field(default=None, repr=False)

    def __call__(self, unit: Unit) -> int:
        if (there := references.read(self.location, unit)) is not None:
            return there.shape[1]
        try:
            said = self._said(unit)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the base model does not fit one GPU to say how likely it finds the answers: {first_line(error)}",
                ["lower train.micro_batch", "train an adapter, which needs no such pass: model.adapter={name: lora}"],
            ) from error
        references.write(self.location, unit, said)
        return said.shape[1]

    @torch.no_grad()
    def _said(self, unit: Unit) -> np.ndarray:
        device = torch.device(self.device)
        if self._module is None:  # not when the actor is made: Ray reports an error there without its class
            base = whole(self.recipe.model.folder(), device, self.dtype)
            settings = self.recipe.train
            self._module = PreferenceLoss(base, settings.loss_chunk, settings.preference, "itself")
        rows = self.prepared.read([unit])
        parts: list[np.ndarray] = []
        for micro in micro_batches(rows, self.recipe.train.micro_batch):
            *inputs, bits = objective.with_reference(micro, device)
            sums = self._module.log_probabilities(*inputs, documents=bits.shape[1])[0]
            parts.append(sums.float().cpu().numpy())
        return _joined(parts)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One below the other, each filled up with zeros to the widest."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
