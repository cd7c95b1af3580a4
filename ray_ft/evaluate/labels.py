"""How well a classifier does on all held-out rows: loss, accuracy, macro F1, each label, and what it is mistaken in.

It is compared with the answer that needs no model: always the label that is commonest in the training rows, its loss
that of their shares. The base itself has no layer that would tell labels apart. Losses are plain ones, without
`train.class_weights`. Limits: as of `losses`, the model is on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from ray_ft.data import pack
from ray_ft.data.counts import Counts
from ray_ft.data.order import Order, Slice
from ray_ft.data.render import load_tokenizer
from ray_ft.errors import DataError
from ray_ft.evaluate.compare import compare
from ray_ft.evaluate.losses import Judged, spread, whole_model
from ray_ft.evaluate.questions import source_name
from ray_ft.evaluate.scores import Accuracy, MacroF1, label_report
from ray_ft.model.classify import LabelLoss
from ray_ft.recipe import Recipe
from ray_ft.train.loop import micro_batches
from ray_ft.train.objective import tensors

WORST = 10  # mistakes that a report lists
SAMPLES = 20
TEXT = 2000  # characters of a text that it shows
SHOWN_LABELS = 20  # in the tables for people


@dataclass(frozen=True)
class Classified:
    """Texts of some rows, in their order, as a model classifies them.

    Attributes:
        wanted, found: numbers of labels: int32 [texts], the row's and the likeliest.
        probability: of the likeliest, float32 [texts].
        losses: float32 [texts], in nats.
        sources: number of each text's source: int64 [texts].
        origins: ``file:line`` of each.
        texts: of those that a report may show, by their place.
    """

    wanted: np.ndarray
    found: np.ndarray
    probability: np.ndarray
    losses: np.ndarray
    sources: np.ndarray
    origins: list[str]
    texts: dict[int, str]

    def mistakes(self) -> list[int]:
        """Places of the wrong ones that the model is surest of, the surest first."""
        wrong = np.flatnonzero(self.wanted != self.found)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:WORST].tolist()

    @staticmethod
    def joined(parts: Sequence[Classified]) -> Classified:
        names = ("wanted", "found", "probability", "losses", "sources")
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        starts = np.cumsum([0, *(len(part.wanted) for part in parts)]).tolist()
        texts = {
            start + at: text for start, part in zip(starts, parts, strict=False) for at, text in part.texts.items()
        }
        return Classified(**arrays, origins=[origin for part in parts for origin in part.origins], texts=texts)


def classify(judged: Judged, recipe: Recipe, on_progress: Callable[[int, int], None]) -> Classified:
    """All held-out texts as the model classifies them, on the connected cluster.

    Raises:
        DataError: there is none.
        RayFtError: what kept the model from being loaded.
    """
    order = Order.once(judged.rows)
    work = [(part,) for part in order.slices(0, order.rows)]
    parts = []
    for part in spread(_Classifier, (judged, recipe), recipe, work):
        parts.append(part)
        on_progress(len(parts), len(work))
    if not parts:
        raise DataError("there is no held-out row", ["look at what was rejected: ray-ft data RECIPE", "more rows"])
    return Classified.joined(parts)


class _Classifier:
    """An actor that holds the model and goes through one part of the rows at a time."""

    def __init__(self, judged: Judged, recipe: Recipe, cuda: bool) -> None:
        self._judged, self._recipe = judged, recipe
        self._device = torch.device("cuda" if cuda else "cpu")
        self._model: LabelLoss | None = None

    def judge(self, part: Slice) -> Classified:
        if self._model is None:  # not when the actor is made: Ray reports an error there without its class
            self._model = LabelLoss(whole_model(self._judged.weights, self._recipe, self._device)).eval()
        order = Order.once(self._judged.rows)
        rows, names = part.read_named(self._judged.rows)
        sizes = [len(each) for each in names]
        logs = torch.cat([
            self._model.log_probabilities(*tensors(micro, self._device)).cpu()
            for micro in micro_batches(rows, self._recipe.train.micro_batch)
        ])  # fmt: skip
        wanted = rows.input_ids[(rows.flags & pack.TRAINED) != 0]
        best, found = logs.max(-1)
        sources = order.sources(part.position, part.position + part.take)
        classified = Classified(
            wanted, found.numpy().astype(np.int32), best.exp().numpy(),
            -logs.gather(1, torch.from_numpy(wanted).long()[:, None])[:, 0].numpy(), np.repeat(sources, sizes),
            [name for each in names for name in each], {},
        )  # fmt: skip
        shown = classified.mistakes() + list(range(SAMPLES if part.position == 0 else 0))
        classified.texts.update(self._texts(rows, set(shown)))
        return classified

    def _texts(self, rows: pack.Rows, places: set[int]) -> dict[int, str]:
        tokenizer = load_tokenizer(self._recipe.model.folder(weights=False))
        found, at = {}, 0
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            start = 0
            for end in np.flatnonzero(flags & pack.TRAINED).tolist():
                if at in places:
                    found[at] = tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=True)[:TEXT]
                start, at = end + 1, at + 1
        return found


def build(
    head: dict[str, Any], name: str, recipe: Recipe, classified: Classified, before: Counts | None
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        head: what stands first: the run and the step.
        name: of the model, for people.
        before: counts of the training rows, to be compared with the commonest label; None: with nothing.
    """
    labels, rows = recipe.model.labels, len(classified.wanted)
    references, answers = ([labels[at] for at in numbers] for numbers in (classified.wanted, classified.found))
    metrics = [kind(references, labels) for kind in (Accuracy, MacroF1)]
    statistics = {metric.name: metric.statistics(answers) for metric in metrics}
    baseline: dict[str, np.ndarray] = {}
    base: dict[str, Any] | None = None
    if before is not None:
        counted = np.array(before.of_labels(len(labels), {n: one.weight for n, one in enumerate(recipe.data.train)}))
        common = labels[int(counted.argmax())]
        baseline = {metric.name: metric.statistics([common] * rows) for metric in metrics}
        shares = (counted + 1) / (counted.sum() + len(labels))  # Laplace's: a label without rows is not impossible
        base = _side(f"always {common!r}", float(-np.log(shares[classified.wanted]).mean()))
        base |= {"title": "commonest label", "scores": {m.name: m.score(baseline[m.name].sum(0)) for m in metrics}}

    def differences(chosen: np.ndarray) -> dict[str, Any]:
        found = {
            m.name: compare(
                statistics[m.name][chosen], baseline[m.name][chosen], m.score, recipe.evaluate.resamples,
                recipe.run.seed,
            )
            for m in metrics
            if baseline
        }  # fmt: skip
        return {name: one.as_json() for name, one in found.items() if one is not None}

    def group(chosen: np.ndarray) -> dict[str, Any]:
        scores = ({m.name: m.score(one[m.name][chosen].sum(0)) for m in metrics} if one else None
                  for one in (statistics, baseline))  # fmt: skip
        return {
            "rows": len(chosen),
            **dict(zip(("model", "base"), scores, strict=True)),
            "difference": differences(chosen),
        }

    def example(at: int) -> dict[str, Any]:
        return {
            "prompt": classified.texts[at],
            "reference": references[at],
            "answer": answers[at],
            "probability": float(classified.probability[at]),
            "origin": classified.origins[at],
        }

    groups = {
        source_name(number, source): group(np.flatnonzero(classified.sources == number))
        for number, source in enumerate(recipe.data.eval)
        if (classified.sources == number).any()
    }
    return {
        **head,
        "task": "labels",
        "engine": "transformers",
        "rows": rows,
        "model": {
            **_side(name, float(classified.losses.mean(dtype=np.float64))),
            "scores": {m.name: m.score(statistics[m.name].sum(0)) for m in metrics},
        },
        "base": base,
        "difference": differences(np.arange(rows)),
        "signatures": {},
        "groups": {"source": groups},
        "labels": _report(answers, references, labels),
        "worst": [example(at) for at in classified.mistakes()],
        "samples": [example(at) for at in range(SAMPLES) if at in classified.texts],
    }


def _side(name: str, loss: float) -> dict[str, Any]:
    return {"name": name, "loss": loss, "perplexity": None, "cut_off": 0, "failed": 0}


def _report(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    found = label_report(answers, references, labels)
    assert found is not None
    confusion = found["confusion"]  # a classifier gives no answer that is no label
    confusion |= {"answers": list(labels), "counts": [row[: len(labels)] for row in confusion["counts"]]}
    return found


def tables(found: dict[str, Any]) -> list[Table]:
    """Each label's precision, recall and F1, and the confusion, for people."""
    names = list(found["per_label"])[:SHOWN_LABELS]
    more = [f"… and {len(found['per_label']) - len(names)} more"] * (len(found["per_label"]) > len(names))
    each = Table("label", "rows", "precision", "recall", "F1", box=None, pad_edge=False, header_style="dim")
    for name in names:
        scores = found["per_label"][name]
        each.add_row(
            escape(name), f"{scores['rows']:,}", *(f"{scores[key]:.3f}" for key in ("precision", "recall", "f1"))
        )
    for line in more:
        each.add_row(line)
    if more:
        return [each]
    confusion = Table("label ↓ answer →", *map(escape, names), box=None, pad_edge=False, header_style="dim")
    for name, counts in zip(names, found["confusion"]["counts"], strict=True):
        confusion.add_row(escape(name), *(f"{count:,}" for count in counts))
    for table in (each, confusion):
        for column in table.columns[1:]:
            column.justify = "right"
    return [each, confusion]
