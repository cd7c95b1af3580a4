"""What the trained weights answer: the measure of every check that compares answers.

A few documents of the run's own packed rows go through the trained model, its adapter unmerged, in the precision of the
export, each by itself; of a run with images some with their images too, which transformers alone is asked. Limits: the
whole model is in the memory of this process (27B in bfloat16: 51 GiB), and after it, in its place, the exported one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ray_ft.data import pack
from ray_ft.data.order import Order
from ray_ft.data.render import Renderer, Tokens, load_tokenizer
from ray_ft.data.samples import Labelled
from ray_ft.errors import ExportError
from ray_ft.trained import Trained

DOCUMENTS = 4  # that are compared
TEXTS = 16  # of a classifier, which gives each a few numbers
PICTURED = 2  # with their images, whole
TOKENS = 256  # of each, at most: 4 × 256 × 262,208 logits of Gemma 3 take 0.5 GiB in bfloat16
PROOF_TOKENS = 128  # of the one in the manifest
DIGITS = 5  # of its log-probabilities
CHUNK = 32  # positions whose logits are compared at once, in float32

#: Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
LAYER_ROUNDINGS = 8  # results of one layer that are rounded and enter what is added to the residual stream
OTHER_ROUNDINGS = 32  # of embedding, last norm and the logits themselves, in the same measure
LARGEST = 16  # times the tolerance of the root mean square that a single value may be off


@dataclass(frozen=True)
class Distance:
    """How far answers are from others, in units of the expected logits' own spread.

    Attributes:
        rms: root mean square of the differences ÷ that of the logits about their mean at each position.
        largest: the largest difference ÷ the same.
    """

    rms: float
    largest: float


@dataclass(frozen=True)
class Tolerance:
    """What rounding alone can do.

    float32: 1e-4, over a hundred times what another order of additions does (7e-7 was seen), and far below what a few
    steps of training do. bfloat16, float16: both computations round, their errors are independent, and add as a random
    walk: 2 · u · √(8 · layers + 32), of unit roundoff u; in bfloat16 2.7% for 2 layers (1.1% was seen), 5.4% for 20
    (1.4%), 9.0% for 62. A single logit may be off by 16 times as much: of 3e8 normal values the largest is 6 times the
    root mean square, and activations have heavier tails.
    """

    rms: float

    @classmethod
    def of(cls, dtype: torch.dtype, layers: int) -> Tolerance:
        if dtype == torch.float32:
            return cls(1e-4)
        return cls(2 * ROUNDOFF[dtype] * math.sqrt(LAYER_ROUNDINGS * layers + OTHER_ROUNDINGS))

    @property
    def largest(self) -> float:
        return LARGEST * self.rms

    def holds(self, distance: Distance) -> bool:
        """False also for NaN."""
        return distance.rms <= self.rms and distance.largest <= self.largest


@dataclass(frozen=True)
class Pictured:
    """A document with images: token ids, which of them are soft, and float32 [images, channels, height, width]."""

    ids: tuple[int, ...]
    soft: tuple[bool, ...]
    pixels: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Attributes:
    documents: token ids of each, of at least two tokens; without those that stand for images.
    logits: [tokens, vocabulary] of each, in the exported precision; of a classifier [1, labels].
    spread: root mean square of all logits about their mean at each position.
    effect: what the adapter changes: from the model without it to the one with it; None without an adapter.
    said: of a classifier, what is in the manifest: a text, and the probability of each label.
    pictured: documents with images, of a run that has any.
    pictured_logits: as `logits`.
    """

    documents: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]
    spread: float
    effect: Distance | None
    said: dict[str, Any] | None = None
    pictured: tuple[Pictured, ...] = ()
    pictured_logits: tuple[torch.Tensor, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, trained: Trained, dtype: torch.dtype) -> Reference:
        documents = tuple(_documents(trained))
        model = trained.model(torch.device("cpu"), dtype)
        logits = tuple(answers(model, ids) for ids in documents)
        pictured = tuple(_pictured(trained))
        seen = tuple(answers(model, one) for one in pictured)
        said = _said(trained, model, documents) if trained.labels else None
        found = cls(documents, logits, _spread(logits), None, said, pictured, seen)
        if not found.spread > 0:
            raise ExportError(
                "the trained model gives every label the same score for every text: it has learnt nothing",
                ["train longer, or with a higher train.optimizer.lr"],
            )
        if trained.recipe.model.adapter is None:
            return found
        return replace(found, effect=found.distance(_without_adapter(model, documents)))

    def distance_of(self, model: Any) -> Distance:
        """Of another model, over all documents; of both kinds the larger."""
        text = self.distance(answers(model, ids) for ids in self.documents)
        if not self.pictured:
            return text
        seen = self._distance(self.pictured_logits, (answers(model, one) for one in self.pictured))
        return Distance(_larger(text.rms, seen.rms), _larger(text.largest, seen.largest))

    def distance(self, found: Any) -> Distance:
        """Of other logits of the same documents, given one document after the other; a constant added to all of a
        position's is no difference, as it changes no probability."""
        return self._distance(self.logits, found)

    def _distance(self, logits: Sequence[torch.Tensor], found: Any) -> Distance:
        squares, largest, count = 0.0, 0.0, 0
        for ours, theirs in zip(logits, found, strict=True):
            for at in range(0, len(ours), CHUNK):
                difference = _centred(theirs[at : at + CHUNK]) - _centred(ours[at : at + CHUNK])
                squares += float(difference.square().sum(dtype=torch.float64))
                largest = _larger(largest, float(difference.abs().max()))
                count += difference.numel()
        return Distance(math.sqrt(squares / count) / self.spread, largest / self.spread)

    def logprob_distance(self, found: Sequence[Sequence[dict[int, float]]]) -> Distance:
        """Of log-probabilities of some tokens.

        Args:
            found: of each document, for each position but the first: token → log-probability.
        """
        squares, largest, count = 0.0, 0.0, 0
        for logits, positions in zip(self.logits, found, strict=True):
            for row, tokens in zip(logits[:-1], positions, strict=True):
                ours = torch.log_softmax(row.float(), -1)[list(tokens)]
                difference = torch.tensor(list(tokens.values())) - ours
                squares += float(difference.square().sum(dtype=torch.float64))
                largest = _larger(largest, float(difference.abs().max()))
                count += len(tokens)
        return Distance(math.sqrt(squares / count) / self.spread, largest / self.spread)

    def proof(self) -> dict[str, Any]:
        """``token_ids`` of the longest document, cut, and ``logprobs`` of all of them but the first; of a classifier
        ``input``, a text, and ``probabilities`` by label."""
        if self.said is not None:
            return self.said
        ids, logits = max(zip(self.documents, self.logits, strict=True), key=lambda pair: len(pair[0]))
        ids = ids[:PROOF_TOKENS]
        said = torch.log_softmax(logits[: len(ids) - 1].float(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return {"token_ids": list(ids), "logprobs": [round(value, DIGITS) for value in said.tolist()]}


def answers(model: Any, document: Sequence[int] | Pictured) -> torch.Tensor:
    """[tokens, vocabulary] of one document, in the model's precision; of a classifier [1, labels]."""
    with torch.no_grad():
        if isinstance(document, Pictured):
            given = {
                "input_ids": torch.tensor([document.ids]),
                "token_type_ids": torch.tensor([document.soft]).long(),
                "pixel_values": torch.from_numpy(document.pixels).to(model.dtype),
            }
        else:
            given = {"input_ids": torch.tensor([document])}
        logits = model(**given, use_cache=False).logits
        return logits.view(-1, logits.shape[-1])


def _pictured(trained: Trained) -> Iterator[Pictured]:
    prepared = trained.prepared("eval") or trained.prepared("train")
    assert prepared is not None
    if not prepared.images:
        return
    left = PICTURED
    for part in Order.once(prepared, window_rows=PICTURED).slices(0, prepared.rows):
        rows = prepared.seen(part.read(prepared))
        assert rows.pixels is not None
        for ids, flags, pixels in zip(rows.input_ids, rows.flags, rows.pixels, strict=True):
            starts = np.flatnonzero(flags & pack.START)
            end = starts[1] if len(starts) > 1 else len(flags)
            soft = (flags[:end] & pack.IMAGE) != 0
            count = int(soft.sum()) // trained.image_tokens  # of the first document of the row, whose images come first
            real = (flags[:end] & pack.REAL) != 0
            if left and count:
                left -= 1
                yield Pictured(tuple(ids[:end][real].tolist()), tuple(soft[real].tolist()), pixels[:count])
        if not left:
            return


def _documents(trained: Trained) -> Iterator[tuple[int, ...]]:
    prepared = trained.prepared("eval") or trained.prepared("train")
    assert prepared is not None
    found = False
    shortest, left = (1, TEXTS) if trained.labels else (2, DOCUMENTS)
    for part in Order.once(prepared).slices(0, left):
        rows = part.read(prepared)
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            starts = np.flatnonzero(flags & pack.START)
            for begin, end in zip(starts, [*starts[1:], len(flags)], strict=True):
                # Without images' tokens; and a label is behind its text, and is not what the model reads.
                marks = pack.REAL | pack.IMAGE | (pack.TRAINED if trained.labels else 0)
                document = ids[begin:end][(flags[begin:end] & marks) == pack.REAL][:TOKENS]
                if left and len(document) >= shortest:
                    left -= 1
                    yield tuple(document.tolist())
                    found = True
    if not found:
        raise ExportError(
            "the run's prepared rows hold no document that is long enough, so nothing can be compared",
            ["raise data.seq_len, or look at what data/rejects.jsonl says of the rows"],
        )


def _said(trained: Trained, model: Any, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a classifier says of the shortest text that says anything: read and answered as by who serves it."""
    renderer = Renderer(load_tokenizer(trained.base))
    texts = [renderer.tokenizer.decode(ids, skip_special_tokens=True) for ids in documents]
    text = min(filter(str.strip, texts), key=len, default="a")
    (tokens,) = renderer.encode([Labelled(text, 0)])
    assert isinstance(tokens, Tokens)
    probabilities = answers(model, tokens.ids[:-1].tolist())[0].float().softmax(-1).tolist()
    said = {name: round(value, DIGITS) for name, value in zip(trained.labels, probabilities, strict=True)}
    return {"input": text, "probabilities": said}


def _without_adapter(model: Any, documents: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    for ids in documents:
        yield answers(model, ids)


def _centred(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits - logits.mean(-1, keepdim=True)


def _larger(one: float, other: float) -> float:
    return other if math.isnan(other) else max(one, other)


def _spread(logits: Sequence[torch.Tensor]) -> float:
    squares = sum(
        float(_centred(one[at : at + CHUNK]).square().sum(dtype=torch.float64))
        for one in logits
        for at in range(0, len(one), CHUNK)
    )
    return math.sqrt(squares / sum(one.numel() for one in logits))
