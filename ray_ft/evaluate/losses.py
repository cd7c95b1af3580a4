"""Loss over every packed held-out row exactly once: of folders and runs in Ray actors, of endpoints over HTTP.

The actors hold one model at a time, one actor per GPU (one in all on CPU), each on one device: a model that does not
fit into one GPU cannot be judged here, only its answers can (vLLM splits it). A base is loaded in the run's compute
precision, also where the run was trained over its 4-bit form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ray_ft import paths, placement
from ray_ft.answers import explained
from ray_ft.data.order import Order
from ray_ft.data.prepared import Prepared
from ray_ft.errors import DataError
from ray_ft.model import attention, load
from ray_ft.recipe import Recipe
from ray_ft.train import objective
from ray_ft.train.loop import micro_batches, tensors
from ray_ft.trained import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loss:
    """Mean over `tokens` target tokens, in nats; `rows` are packed ones."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^709 is the largest float


@dataclass(frozen=True)
class Judged:
    """A model and the rows that it is judged on.

    Attributes:
        weights: a run, as of one checkpoint; or the folder, URI or hub id of a model.
    """

    weights: Trained | str
    rows: Prepared


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
    # No more than the run itself had: the cluster may be others' too.
    gpus = min(placement.gpus_within_reach(), recipe.train.world_size) if recipe.train.device != "cpu" else 0
    orders = [Order.once(one.rows) for one in judged]
    # The models one after the other, so that every actor loads each at most once.
    work = [(number, part) for number, order in enumerate(orders) for part in order.slices(0, order.rows)]
    sums = [(0.0, 0)] * len(judged)
    for done, (number, total, tokens) in enumerate(_judged(judged, recipe, work, gpus), start=1):
        sums[number] = (sums[number][0] + total, sums[number][1] + tokens)
        on_progress(done, len(work))
    if any(not tokens for _, tokens in sums):
        raise DataError(
            "the held-out rows hold no token to judge", ["look at what was rejected: ray-ft data RECIPE", "more rows"]
        )
    return [Loss(total / tokens, tokens, one.rows.rows) for (total, tokens), one in zip(sums, judged, strict=True)]


def _judged(
    judged: Sequence[Judged], recipe: Recipe, work: list[tuple[int, Any]], gpus: int
) -> Iterator[tuple[int, float, int]]:
    """(number of the model, sum of losses, target tokens) for every part of the work, in its order."""
    import ray
    from ray.util import ActorPool

    if not work:
        return
    judge = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Judge)
    actors = [judge.remote(judged, recipe, gpus > 0) for _ in range(min(max(gpus, 1), len(work)))]
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

    def judge(self, number: int, part: Any) -> tuple[int, float, int]:
        if self._held != number:  # not when the actor is made: Ray reports an error there without its class
            self._model = None  # there may be no room for two
            whole = whole_model(self._judged[number].weights, self._recipe, self._device)
            self._model = objective.of(self._recipe).module(whole, self._recipe)
            self._held = number
        return number, *self._sum(part, self._judged[number].rows)

    @torch.no_grad()
    def _sum(self, part: Any, prepared: Prepared) -> tuple[float, int]:
        rows = part.read(prepared)
        total = 0.0
        for micro in micro_batches(rows, self._recipe.train.micro_batch):
            total += float(self._model(*tensors(prepared.seen(micro), self._device))[:, 0].sum())
        return total, int(objective.of(self._recipe).targets(rows.flags).sum())


def whole_model(weights: Trained | str, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """A model on one device in the run's compute precision, on whichever node this runs.

    Raises:
        ModelError, CheckpointError: it cannot be loaded.
    """
    lowered = recipe.model.dtype == "bfloat16" or (device.type == "cuda" and recipe.model.dtype == "auto")
    dtype = torch.bfloat16 if lowered else torch.float32
    if isinstance(weights, Trained):  # its base, too, may lie elsewhere on this node
        return replace(weights, base=weights.recipe.model.folder()).model(device, dtype)
    folder = paths.model_folder(weights)
    config = load.load_config(folder)
    chosen = attention.choose("auto", device.type, config, dtype, images=recipe.data.images is not None)
    model = load.build(config, chosen.implementation, dtype)
    load.allocate(model, device)
    load.fill(model, folder, load.whole_spans(model))
    return model.eval()
