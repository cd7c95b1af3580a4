"""Loss over every packed held-out row exactly once: of folders and runs in Ray actors, of endpoints over HTTP.

The actors hold one model at a time, one actor per GPU (one in all on CPU), each on one device: a model that does not
fit into one GPU cannot be judged here, only its answers can (vLLM splits it). A base is loaded in the run's compute
precision, also where the run was trained over its 4-bit form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_ft import hub
from ray_ft.answers import explained
from ray_ft.data.order import Order
from ray_ft.data.prepared import Prepared
from ray_ft.errors import DataError
from ray_ft.model.preference import PreferenceLoss, Reference
from ray_ft.model.whole import whole
from ray_ft.recipe import Recipe
from ray_ft.train import objective, references
from ray_ft.train.loop import micro_batches
from ray_ft.trained import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loss:
    """Mean over `targets`, in nats; `rows` are packed ones.

    Attributes:
        unit: what the targets are, such as "tokens".
        statistics: what else is a mean over them, by name.
    """

    loss: float
    targets: int
    rows: int
    unit: str = "tokens"
    statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """Of tokens alone."""
        return math.exp(min(self.loss, 700.0)) if self.unit == "tokens" else None  # e^709 is the largest float


@dataclass(frozen=True)
class Judged:
    """A model and the rows that it is judged on.

    Attributes:
        weights: a run, as of one checkpoint; or the folder, URI or hub id of a model.
        reference: of pairs, what the model is compared with; None: what its training compares it with.
    """

    weights: Trained | str
    rows: Prepared
    reference: Reference | None = None


def losses(
    judged: Sequence[Judged], recipe: Recipe, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Loss]:
    """The loss of each model, on the connected cluster.

    Args:
        recipe: whose precision, micro-batch and devices are used.

    Raises:
        DataError: held-out rows without any target token.
        RayFtError: what kept a model from being loaded.
    """
    orders = [Order.once(one.rows) for one in judged]
    # The models one after the other, so that every actor loads each at most once.
    work = [(number, part) for number, order in enumerate(orders) for part in order.slices(0, order.rows)]
    task = objective.of(recipe)
    sums = [objective.Sums(task, (), torch.device("cpu")) for _ in judged]
    for done, (number, values) in enumerate(spread(_Judge, (judged, recipe), recipe, work), start=1):
        sums[number].values += values
        on_progress(done, len(work))
    means = [one.read(one.values.tolist()) for one in sums]
    if any(not found.targets for found in means):
        raise DataError(
            "the held-out rows hold no token to judge", ["look at what was rejected: ray-ft data RECIPE", "more rows"]
        )
    return [
        Loss(found.loss, found.targets, one.rows.rows, task.unit, found.statistics)
        for found, one in zip(means, judged, strict=True)
    ]


def spread(kind: type[Any], made: tuple[Any, ...], recipe: Recipe, work: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """What actors find for every part of the work, in its order.

    Args:
        kind: class of the actors, made with `made` and whether they are on GPUs; their `judge` takes a part.
        recipe: whose devices are used.
    """
    import ray
    from ray.util import ActorPool

    if not work:
        return
    gpus = references.gpus_for(recipe)  # no more than the run itself had: the cluster may be others' too
    judge = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(kind)
    actors = [judge.remote(*made, gpus > 0) for _ in range(min(max(gpus, 1), len(work)))]
    try:
        with explained("a model to be judged", "lower train.micro_batch", "leave the base out: --no-base"):
            yield from ActorPool(actors).map(lambda actor, item: actor.judge.remote(*item), work)
    finally:
        for actor in actors:
            ray.kill(actor)


class _Judge:
    """An actor that holds one model at a time and goes through one part of the rows at a time."""

    def __init__(self, judged: Sequence[Judged], recipe: Recipe, cuda: bool) -> None:
        self._judged, self._recipe = judged, recipe
        self._device = torch.device("cuda" if cuda else "cpu")
        self._held: int | None = None
        self._model: Any = None

    def judge(self, number: int, part: Any) -> tuple[int, torch.Tensor]:
        if self._held != number:  # not when the actor is made: Ray reports an error there without its class
            self._model = None  # there may be no room for two
            model = whole_model(self._judged[number].weights, self._recipe, self._device)
            self._model = self._module(model, self._judged[number].reference)
            self._held = number
        return number, self._sum(part, self._judged[number].rows)

    def _module(self, model: PreTrainedModel, reference: Reference | None) -> nn.Module:
        if reference is None:
            return objective.of(self._recipe).module(model, self._recipe, None)
        settings = self._recipe.train
        return PreferenceLoss(model, settings.loss_chunk, settings.preference, reference)

    @torch.no_grad()
    def _sum(self, part: Any, prepared: Prepared) -> torch.Tensor:
        task = objective.of(self._recipe)
        sums = objective.Sums(task, (), self._device)
        for micro in micro_batches(part.read(prepared), self._recipe.train.micro_batch):
            sums.add(self._model(*task.inputs(prepared.seen(micro), self._device)), micro.flags, None)
        return sums.values.cpu()


def whole_model(weights: Trained | str, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """A model on one device in the run's compute precision, on whichever node this runs.

    Raises:
        ModelError, CheckpointError: it cannot be loaded.
    """
    lowered = recipe.model.dtype == "bfloat16" or (device.type == "cuda" and recipe.model.dtype == "auto")
    dtype = torch.bfloat16 if lowered else torch.float32
    if isinstance(weights, Trained):  # its base, too, may lie elsewhere on this node
        return replace(weights, base=weights.recipe.model.folder()).model(device, dtype)
    images = recipe.data.images is not None
    return whole(hub.model_folder(weights), device, dtype, recipe.model.labels, images=images)
