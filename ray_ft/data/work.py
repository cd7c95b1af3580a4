"""The work on one chunk: its rows read, checked, tokenized, packed and counted, segment by segment.

A pure function of the chunk's bytes and of what `Work` holds, which travels to the task that does it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ft import hub
from ray_ft.data import duplicates, sources
from ray_ft.data import tokenizer as tokenizers
from ray_ft.data.counts import TOO_LONG, Counts
from ray_ft.data.formats import columns_used
from ray_ft.data.images import ImageReader
from ray_ft.data.lines import Reject
from ray_ft.data.pack import REAL, TRAINED, pack
from ray_ft.data.prepared import Split, vision_of
from ray_ft.data.render import Renderer, Tokens, load_tokenizer
from ray_ft.data.rows import to_sample
from ray_ft.data.shard import Segment
from ray_ft.data.sources import Chunk
from ray_ft.recipe import AnySource, Images, LabelsSource, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEGMENT_TOKENS = 2 << 20  # tokens packed together; one Parquet row group, 10 MB in memory
SEGMENT_IMAGE_BYTES = 64 << 20  # images of rows packed together, at which a segment ends as well
ENCODE_BATCH = 512  # samples per call of the tokenizer
ENCODE_IMAGES = 32  # the same, in a run with images, whose files are held meanwhile


@lru_cache(maxsize=4)
def tokenizer_of(model: str, code: bool) -> PreTrainedTokenizerBase:
    """Resolved once per process, not per chunk: a hub id asks the hub, a URI lists the storage."""
    return load_tokenizer(hub.model_folder(model, weights=False, code=code))


@lru_cache(maxsize=4)
def tokenizer_identity(model: str, code: bool) -> dict[str, Any]:
    return tokenizers.identity(tokenizer_of(model, code))


def elsewhere(recipe: Recipe, model_folder: str) -> str:
    """What other nodes resolve the model by: a hub id or a URI is not where this node has put it."""
    return model_folder if os.path.isdir(recipe.model.path) else recipe.model.location


@dataclass
class Seen:
    """What became of a chunk's rows; `lines` counts the lines passed."""

    counts: Counts = field(default_factory=Counts)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    lines: int = 0


@dataclass(frozen=True)
class Work:
    """What one chunk's work needs to know; travels to the task that does it."""

    location: str
    model_folder: str
    sources: tuple[AnySource, ...]
    seq_len: int
    packing: bool
    long_rows: str
    segment_tokens: int
    tokenizer: dict[str, Any]
    """What `tokenizer.identity` said."""
    code: bool
    """Whether code in the model's folder may run, as the recipe's model.trust_remote_code says."""
    labels: tuple[str, ...] = ()
    """The recipe's model.labels."""
    images: Images | None = None
    """The recipe's data.images."""

    @classmethod
    def of(cls, recipe: Recipe, split: Split, location: str, model_folder: str, identity: dict[str, Any]) -> Work:
        model = elsewhere(recipe, model_folder)
        tokenizer = {name: identity[name] for name in ("tokenizer", "template")}
        wanted, segment_tokens = tuple(getattr(recipe.data, split)), identity["cut"]["segment_tokens"]
        return cls(
            location, model, wanted, **identity["layout"], segment_tokens=segment_tokens, tokenizer=tokenizer,
            code=recipe.model.trust_remote_code, labels=tuple(recipe.model.labels), images=recipe.data.images,
        )  # fmt: skip

    def segments(self, chunk: Chunk, seen: Seen, first: int = 1) -> Iterator[Segment]:
        """The packed rows of a chunk, segment by segment; what became of its rows is added to `seen`.

        Args:
            first: line of the chunk to begin at: that of an earlier call's segment, which then comes first.
        """
        tokenizer = tokenizer_of(self.model_folder, self.code)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        counts, labelled = seen.counts, isinstance(self.sources[chunk.source], LabelsSource)
        pending: list[Tokens] = []
        lines: list[int] = []
        size = image_bytes = 0

        def packed() -> Segment:
            rows, members = pack(
                pending, self.seq_len, packing=self.packing, pad_id=pad_id, images=self.images is not None
            )
            counts.tokens += int(np.count_nonzero(rows.flags & REAL))
            counts.trained_tokens += int(np.count_nonzero(rows.flags & TRAINED))
            counts.packed += len(rows)
            segment = Segment(rows, [[lines[i] for i in row] for row in members], first)
            pending.clear()
            lines.clear()
            return segment

        vision = vision_of(self.model_folder) if self.images else None
        for line, result in self._samples(chunk, Renderer(tokenizer, self.seq_len, vision), first):
            seen.lines = line
            if result is None:
                continue
            counts.rows += 1
            if isinstance(result, Tokens):
                counts.lengths[1 << max(len(result) - 1, 0).bit_length()] += 1
                result, cut = self._fit(result)
                counts.truncated += cut
            if isinstance(result, Reject):
                counts.rejected[result.reason] += 1
                seen.rejects.append({"file": chunk.file.name, "line": line, **asdict(result)})
                continue
            counts.used += 1
            if labelled:
                counts.labels[f"{chunk.source}/{result.ids[-1]}"] += 1
            seen.hashes.append(duplicates.row_hash(result))
            pending.append(result)
            lines.append(line)
            size += len(result)
            image_bytes += sum(map(len, result.images))
            if size >= self.segment_tokens or image_bytes >= SEGMENT_IMAGE_BYTES:
                yield packed()
                size, image_bytes, first = 0, 0, line + 1
        if pending:
            yield packed()

    def _samples(self, chunk: Chunk, renderer: Renderer, first: int) -> Iterator[tuple[int, Tokens | Reject | None]]:
        """(line, tokens or why there are none) for every row from line `first` on, in order; None for a blank line."""
        source = self.sources[chunk.source]
        images = ImageReader.of(chunk.file, self.images)
        waiting: list[tuple[int, Any]] = []

        def encoded() -> Iterator[tuple[int, Tokens | Reject | None]]:
            tokens = iter(renderer.encode([s for _, s in waiting if s is not None and not isinstance(s, Reject)]))
            for line, sample in waiting:
                yield line, sample if sample is None or isinstance(sample, Reject) else next(tokens)
            waiting.clear()

        for row in sources.read_rows(chunk, columns_used(source)):
            if row.line < first:
                continue
            content: Any = row.content
            if isinstance(content, dict):
                content = to_sample(source, content, renderer.special, labels=self.labels, images=images)
            waiting.append((row.line, content))
            if len(waiting) == (ENCODE_IMAGES if images else ENCODE_BATCH):
                yield from encoded()
        yield from encoded()

    def _fit(self, tokens: Tokens) -> tuple[Tokens | Reject, bool]:
        """The sample if it fits, cut or rejected as the recipe says; and whether it was cut. A pair is never cut."""
        cut = len(tokens) > self.seq_len
        if cut and (self.long_rows == "drop" or tokens.images):  # a part of an image is none
            more = "" if tokens.whole else "more than "
            return Reject(TOO_LONG, f"{more}{len(tokens)} tokens, data.seq_len is {self.seq_len}"), False
        if cut:
            tokens = tokens.cut(self.seq_len)
        at = tokens.rejected_at
        if not tokens.trained[:at].any() or (at is not None and not tokens.trained[at:].any()):
            detail = f"the answer begins after token {self.seq_len}" if cut else "no token of it is a target"
            return Reject("nothing to train on", detail), False
        return tokens, cut
