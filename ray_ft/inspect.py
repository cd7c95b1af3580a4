"""What training will see: counts, rejects, lengths, packing, and examples with the trained tokens marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_ft.data import pack
from ray_ft.data.order import Order
from ray_ft.data.prepare import Prepared, Split
from ray_ft.data.render import load_tokenizer
from ray_ft.recipe import Recipe
from ray_ft.train.schedule import total_steps

BAR = 30  # characters of the longest bar in the histogram
TRAINED_STYLE = "bold green"


def show(recipe: Recipe, splits: Mapping[Split, Prepared], console: Console, examples: int) -> None:
    """Print the prepared data of a recipe.

    Args:
        splits: "train" and, where there is held-out data, "eval".
        examples: packed rows of the training order that are decoded.
    """
    console.print(_table(splits))
    for name, prepared in splits.items():
        if said := prepared.counts.say_labels(recipe.model.labels):
            console.print(f"{name} labels: {said}", markup=False)
        if prepared.counts.rejected:
            console.print(f"{name} rejects: {'; '.join(prepared.counts.common_reasons())}", markup=False)
            console.print(f"  each with file, line and reason: {prepared.rejects}", markup=False)
    train = splits["train"]
    console.print(_histogram(train, recipe.data.seq_len))
    order = Order.of(recipe, train)
    settings = recipe.train
    console.print(
        f"one step: {settings.global_batch} rows × {recipe.data.seq_len} tokens = {settings.micro_batch} rows × "
        f"{settings.world_size} workers × {settings.accumulation} accumulation; {total_steps(recipe, order)} steps",
        markup=False,
    )
    for line in order.passes_lines(total_steps(recipe, order) * settings.global_batch):
        console.print(line, markup=False)
    if examples:
        tokenizer = load_tokenizer(recipe.model.folder(weights=False))
        named = "labels" if recipe.model.labels else "trained tokens"
        console.print(Text.assemble("examples (", (named, TRAINED_STYLE), " are the targets of the loss):"))
        for text in _examples(order, tokenizer, examples, recipe.model.labels, coloured=console.is_terminal):
            console.print(text)


def _table(splits: Mapping[Split, Prepared]) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("", "rows in", "used", "rejected", "truncated", "tokens", "trained", "packed rows", "real tokens")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, prepared in splits.items():
        c = prepared.counts
        numbers = (c.rows, c.used, c.rejected.total(), c.truncated, c.tokens, c.trained_tokens, c.packed)
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{prepared.non_pad_share:.1%}")
    return table


def _histogram(prepared: Prepared, seq_len: int) -> Text:
    lengths = prepared.counts.lengths
    most = max(lengths.values(), default=1)
    text = Text("tokens in a sample:\n")
    for top in sorted(lengths):
        count = lengths[top]
        label = f"{top // 2 + 1}–{top}"
        bar = "█" * max(round(BAR * count / most), 1)
        text.append(f"  {label:>13}  {bar:<{BAR}}  {count:,}{'  (over seq_len)' if top // 2 >= seq_len else ''}\n")
    text.rstrip()
    return text


def _examples(order: Order, tokenizer: object, count: int, labels: list[str], coloured: bool) -> Iterator[Text]:
    """The first document of each of the first rows that training will take; of pairs both, the rejected one second."""
    for part in order.slices(0, min(count, order.rows)):
        rows = part.read(order.prepared)
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            starts = [*np.flatnonzero(flags & pack.START).tolist(), len(ids)]
            paired = bool(pack.pairs(flags[None])[0])
            soft = (flags & pack.IMAGE) != 0
            shown = ~(soft & np.roll(soft, 1))  # of an image's tokens, the first
            for at, name in enumerate(("chosen: ", "rejected: ") if paired else ("",)):
                document = np.arange(starts[at], starts[at + 1])[shown[starts[at] : starts[at + 1]]]
                trained = (flags[document] & pack.TRAINED) > 0
                yield Text.assemble("  ", name, _decoded(ids[document], trained, tokenizer, labels, coloured))


def _decoded(ids: np.ndarray, trained: np.ndarray, tokenizer: object, labels: list[str], coloured: bool) -> Text:
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    for start, stop in itertools.pairwise(edges):
        numbers = ids[start:stop].tolist()
        if labels and trained[start]:
            piece = labels[numbers[0]]
        else:
            piece = tokenizer.decode(numbers).replace("\n", "⏎")  # type: ignore[attr-defined]
        if trained[start] and not coloured:
            piece = f"⟦{piece}⟧"  # without colours the trained part is in brackets
        text.append(piece, style=TRAINED_STYLE if trained[start] else "dim")
    return text
