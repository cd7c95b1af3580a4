"""What a step's loss is a mean over, and what else is summed with it.

Every objective's module gives a row for each row of the batch: the sum of its losses, then of each statistic. The
loop adds them up over micro-batches, workers and sources and divides by the number of targets, so that losses and
statistics, like steps, do not depend on how rows lie over workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ray_ft.data import pack
from ray_ft.data.counts import Counts
from ray_ft.model.classify import LabelLoss
from ray_ft.model.loss import LossModel
from ray_ft.model.preference import STATISTICS, PreferenceLoss, Reference
from ray_ft.recipe import Recipe, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Objective:
    """
    Attributes:
        unit: what is counted, for people: "tokens".
        module: wraps a model so that its forward pass gives the sums; takes the recipe, and what was counted of the
            training rows where it is to be trained.
        inputs: what the module is given for some rows, on a device.
        targets: how many of them are in each row: [rows] from the rows' flags, uint8 [rows, tokens].
        statistics: names of what the module sums beside the loss, in its order.
        told: what is reported of their means over the targets, by name; as they are, if nothing else is said.
    """

    unit: str
    module: Callable[[PreTrainedModel, Recipe, Counts | None], nn.Module]
    inputs: Callable[[pack.Rows, torch.device], tuple[torch.Tensor, ...]]
    targets: Callable[[np.ndarray], np.ndarray]
    statistics: tuple[str, ...] = ()
    told: Callable[[dict[str, float]], dict[str, float]] = dict


def tensors(rows: pack.Rows, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(input_ids, position_ids, labels), each int64 [rows, tokens], without columns that are padding in every row; of a
    run with images also (soft, pixels): bool [rows, tokens], and float32 [images, channels, height, width] of all rows.

    Leaving padding out changes nothing that is computed for real tokens. The width is rounded up to a multiple of 64,
    so that allocators and compiled kernels see few different shapes.
    """
    longest = int(np.count_nonzero((rows.flags & pack.REAL).any(axis=0)))
    width = min(max(-(-longest // 64) * 64, 64), rows.flags.shape[1])
    ids, flags = rows.input_ids[:, :width], rows.flags[:, :width]
    arrays = [ids.astype(np.int64), pack.position_ids(flags), pack.labels(ids, flags)]
    if rows.pixels is not None:
        arrays += [(flags & pack.IMAGE) != 0, np.concatenate(list(rows.pixels))]
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


def with_reference(rows: pack.Rows, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The same of pairs, and what the reference says of their documents, as `PreferenceLoss.forward` takes it.

    Zeros where the rows do not tell, of as many documents as there are.
    """
    said = rows.reference
    if said is None:
        said = np.zeros((len(rows), 2 * max(int(pack.pairs(rows.flags).max(initial=0)), 1)), np.float32)
    bits = torch.from_numpy(np.ascontiguousarray(said)).view(torch.int32)
    return (*tensors(rows, device), bits.to(device, non_blocking=True))


def trained_tokens(flags: np.ndarray) -> np.ndarray:
    return np.count_nonzero(flags & pack.TRAINED, axis=1)


def language(model: PreTrainedModel, recipe: Recipe, counts: Counts | None = None) -> nn.Module:
    return LossModel(model, recipe.train.loss_chunk)


def labels(model: PreTrainedModel, recipe: Recipe, counts: Counts | None = None) -> nn.Module:
    return LabelLoss(model, None if counts is None else class_weights(recipe, counts))


def class_weights(recipe: Recipe, counts: Counts) -> list[float] | None:
    """By how much each label counts, as `train.class_weights` says; None: all alike.

    They are scaled so that their mean over the rows of an epoch is 1. The sum of weighted losses can then be divided by
    the number of rows, as always: over an epoch that is their weighted mean (that of torch's `CrossEntropyLoss`), and
    a step's gradient does not depend on which labels happen to be in it, as it would if each step had its own divisor.

    Args:
        counts: of the training rows.
    """
    wanted, names = recipe.train.class_weights, recipe.model.labels
    if not wanted:
        return None
    rows = np.array(counts.of_labels(len(names), {n: one.weight for n, one in enumerate(recipe.data.train)}))
    if wanted == "balanced":  # a label without rows has no loss to be weighted
        found = np.divide(1.0, rows, out=np.ones_like(rows), where=rows > 0)
    else:
        found = np.array([wanted.get(name, 1.0) for name in names])
    return (found * rows.sum() / (found @ rows)).tolist()


def of_labels(names: Sequence[str]) -> Objective:
    """Of a classifier with these labels: accuracy and macro F1, the latter from counts of each label."""
    kinds = [[f"{kind} {name}" for name in names] for kind in ("right", "wanted", "said")]
    statistics = tuple(itertools.chain.from_iterable(kinds))

    def told(means: dict[str, float]) -> dict[str, float]:
        right, wanted, said = ([means[one] for one in kind] for kind in kinds)
        # Of the labels that rows have, as `ray-ft evaluate` reports it: F1 = 2 right ÷ (wanted + said).
        scores = [2 * r / (w + s) for r, w, s in zip(right, wanted, said, strict=True) if w]
        return {"accuracy": sum(right), "macro_f1": sum(scores) / len(scores)}

    return Objective("labels", labels, tensors, trained_tokens, statistics, told)


def preference(model: PreTrainedModel, recipe: Recipe, counts: Counts | None = None) -> nn.Module:
    return PreferenceLoss(model, recipe.train.loss_chunk, recipe.train.preference, reference_of(recipe))


def reference_of(recipe: Recipe) -> Reference:
    """Where the reference's log-probabilities come from: the adapter is switched off where nothing else is trained."""
    return "adapter off" if recipe.model.adapter and not recipe.model.unfreeze else "rows"


TOKENS = Objective("tokens", language, tensors, trained_tokens)
PAIRS = Objective("pairs", preference, with_reference, pack.pairs, STATISTICS)


def of(recipe: Recipe) -> Objective:
    """What the recipe's task is trained for."""
    of_task: dict[Task, Callable[[], Objective]] = {
        "language": lambda: TOKENS,
        "labels": lambda: of_labels(recipe.model.labels),
        "preference": lambda: PAIRS,
    }
    return of_task[recipe.data.task]()


class Sums:
    """Sums of losses, targets and statistics over rows, for each of `sources` (a recipe's numbers; none: one for all).

    `values` is float64, flat, on the device that the workers talk over; it may be summed over workers in place.
    """

    def __init__(self, objective: Objective, sources: tuple[int, ...], device: torch.device) -> None:
        self._objective = objective
        self._sources = sources if len(sources) > 1 else ()
        width = 2 + len(objective.statistics)
        self.values = torch.zeros(max(len(self._sources), 1) * width, dtype=torch.float64, device=device)

    def add(self, found: torch.Tensor, flags: np.ndarray, sources: np.ndarray | None) -> None:
        """What the module gave for some rows, [rows, 1 + statistics].

        Args:
            sources: number of each row's source, or of none for padding; needed where there are several.
        """
        counts = torch.from_numpy(self._objective.targets(flags)).to(found.device, torch.float64)[:, None]
        rows = torch.cat((found.detach()[:, :1].double(), counts, found.detach()[:, 1:].double()), dim=1)
        table = self.values.view(-1, rows.shape[1])
        if not self._sources:
            table += rows.sum(0)
            return
        assert sources is not None
        at = np.searchsorted(self._sources, sources).clip(max=len(self._sources) - 1)  # padding adds nothing anywhere
        table.index_add_(0, torch.from_numpy(at).to(found.device), rows)

    def read(self, values: list[float]) -> Means:
        """What `values`, summed over all workers, say."""
        table = np.asarray(values, np.float64).reshape(-1, 2 + len(self._objective.statistics))
        loss, targets, *statistics = table.sum(0).tolist()
        with np.errstate(invalid="ignore", divide="ignore"):
            return Means(
                float(np.float64(loss) / targets),
                int(targets),
                self._objective.told(
                    {name: total / targets for name, total in zip(self._objective.statistics, statistics, strict=True)}
                )
                if targets
                else {},
                {source: row[0] / row[1] for source, row in zip(self._sources, table.tolist(), strict=False) if row[1]},
            )


@dataclass(frozen=True)
class Means:
    """Means over `targets`: the loss (nats), what is told of the statistics, and the loss of each source that had a
    target."""

    loss: float
    targets: int
    statistics: dict[str, float]
    by_source: dict[int, float]

    def more(self, split: str) -> Iterator[tuple[str, float]]:
        """What metrics hold beside the loss: statistics, ``loss/data.train.0``; held out with ``eval_`` in front."""
        prefix = "eval_" if split == "eval" else ""
        for name, value in self.statistics.items():
            yield f"{prefix}{name}", value
        for source, loss in self.by_source.items():
            yield f"{prefix}loss/data.{split}.{source}", loss
