"""How full packed rows are, beside TRL's, and whether a document in them sees another.

    python -m benchmarks.packing [--pairs 8] [--to FILE]

Rows with lengths of five distributions go through the whole of ray-ft's preparation: read, cut into chunks, tokenized,
packed segment by segment. TRL packs the same samples by `pack_dataset(strategy="bfd")` as SFTTrainer calls it, and for
comparison all of them at once, which SFTTrainer offers no setting for. No packing can do with fewer rows than `fewest`
says: what fits is a matter of the lengths. Packing alone is timed on samples in memory, A and B in turn. In the end one
document after the other in packed rows is replaced: where another's logits change in any bit, that one sees it.
Limits: lengths are drawn, and words are one token each; both do not matter to packing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.isolation import OURS, THEIRS, isolation
from benchmarks.lengths import DISTRIBUTIONS, SAMPLES, TOKENS, drawn, fewest
from benchmarks.pairs import interleaved, ratios, spread
from benchmarks.peers import packages
from benchmarks.result import Figure, Table, options, recorded
from ray_ft import demo, recipe
from ray_ft.data import pack, stream
from ray_ft.data.prepare import prepare
from ray_ft.data.render import Tokens
from ray_ft.data.work import SEGMENT_TOKENS

SEQ_LENS = (256, 1024, 4096)
TIMED = ("chat", 1024)  # distribution and seq_len whose packing is timed, with all SAMPLES
AT_ONCE = f"{THEIRS}, all at once"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("n", "st", "rk", "nd", "ls"))  # 4.6 bytes each


# ------------------------------------------------------------------------------------------------------------ packing


def write_tokenizer(folder: str) -> None:
    """A folder with a tokenizer that makes one token of every word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name.strip('<>')}_token": name for name in SPECIALS}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def prepared(lengths: np.ndarray, seq_len: int, scratch: str, tokenizer: str) -> tuple[int, int]:
    """Packed rows, and real tokens in them, of rows that ray-ft's preparation makes of texts of these lengths.

    Raises:
        ValueError: a sample went missing, or its length is another.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = os.path.join(folder, "rows.jsonl")
        words = np.array(WORDS)
        with open(file, "w", encoding="utf-8") as rows:
            for length in lengths.tolist():  # ray-ft adds what begins and ends a text
                rows.write(json.dumps({"text": " ".join(words[rng.integers(0, len(words), length - 2)])}) + "\n")
        settings = recipe.parse(
            {
                "run": {"name": "packing", "storage": folder},
                "model": {"path": tokenizer},
                "data": {"train": [{"path": file, "format": "text"}], "seq_len": seq_len},
            }
        )
        counts = prepare(settings, "train", tokenizer, stream.in_process).counts
    if (counts.used, counts.tokens) != (len(lengths), int(lengths.sum())):
        raise ValueError(f"{counts.used} samples with {counts.tokens} tokens, not {len(lengths)} with {lengths.sum()}")
    return counts.packed, counts.tokens


def in_segments(samples: Sequence[Tokens], seq_len: int) -> int:
    """Packed rows of samples in memory, laid out segment by segment as preparation does."""
    rows, pending, size = 0, list[Tokens](), 0
    for sample in samples:
        pending.append(sample)
        size += len(sample)
        if size >= SEGMENT_TOKENS:
            rows += len(pack.pack(pending, seq_len, packing=True, pad_id=0)[0])
            pending, size = [], 0
    return rows + (len(pack.pack(pending, seq_len, packing=True, pad_id=0)[0]) if pending else 0)


def compared(name: str, seq_len: int, scratch: str, tokenizer: str) -> dict[str, Any]:
    """One cell: how full rows are on each side, and at most."""
    from benchmarks.peers import trl_pack

    lengths = drawn(name, seq_len, seed=seq_len)
    tokens = int(lengths.sum())
    samples = trl_pack.dataset(np.zeros(tokens, np.int64), lengths)
    rows = {
        OURS: prepared(lengths, seq_len, scratch, tokenizer)[0],
        THEIRS: len(trl_pack.packed(samples, seq_len)),
        AT_ONCE: len(trl_pack.packed(samples, seq_len, whole=True)),
        "bound": fewest(lengths, seq_len),
    }
    print(f"{name}, {seq_len}: rows {rows}", file=sys.stderr, flush=True)
    shares = {side: tokens / (count * seq_len) for side, count in rows.items()}
    return {"name": name, "seq_len": seq_len, "samples": len(lengths), "tokens": tokens, "rows": rows, "share": shares}


def timed(pairs: int) -> list[dict[str, float]]:
    """Seconds to pack the same samples, all in memory, pair for pair."""
    from benchmarks.peers import trl_pack

    name, seq_len = TIMED
    lengths = drawn(name, seq_len, seed=0, tokens=SAMPLES * seq_len)
    ids = np.random.default_rng(0).integers(0, 1000, int(lengths.sum()))
    cuts = np.cumsum(lengths)[:-1]
    flags = np.ones(len(ids), bool)
    small = ids.astype(np.int32)
    samples = [Tokens(*one) for one in zip(np.split(small, cuts), np.split(flags, cuts), strict=True)]
    theirs = trl_pack.dataset(ids, lengths)

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    arms = {
        OURS: lambda _: seconds(lambda: in_segments(samples, seq_len)),
        THEIRS: lambda _: seconds(lambda: trl_pack.packed(theirs, seq_len)),
    }
    return interleaved(arms, pairs, show=lambda pair: f"{pair[OURS]:.2f} and {pair[THEIRS]:.2f} s to pack")


# ---------------------------------------------------------------------------------------------------------- the whole


CONDITIONS = {
    "data": f"drawn lengths, up to {SAMPLES:,} samples and {TOKENS:,} tokens a cell, longer ones cut to seq_len: "
    + "; ".join(f"{name}: {one.about}" for name, one in DISTRIBUTIONS.items()),
    "threads": "1 on each side",
    "flops": "none",
    "clipping": "none",
    "padding": "is what is measured: real tokens ÷ (rows × seq_len)",
    "time": f"of packing alone, {TIMED[0]} at {TIMED[1]} with {SAMPLES:,} samples: ids and flags laid out in rows by "
    "ray-ft, input_ids and labels as Arrow lists by TRL, both from memory to memory",
}


def main() -> None:
    given = options(__doc__, pairs=8).parse_args()
    sys.path.append(packages.folder())  # last, so that what the lock has comes first
    os.environ |= {name: value for name, value in packages.environment(1).items() if name.startswith("HF_")}
    torch.set_num_threads(1)
    about = "rows packed by ray-ft's preparation (A) and by TRL's pack_dataset with strategy bfd (B)"
    with (
        recorded("packing", about, CONDITIONS, given, peers=[packages.folder()]) as result,
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
    ):
        write_tokenizer(tokenizer := str(Path(scratch) / "tokenizer"))
        cells = [compared(name, seq_len, scratch, tokenizer) for seq_len in SEQ_LENS for name in DISTRIBUTIONS]
        times = timed(given.pairs)
        made = demo.write_demo(os.path.join(scratch, "demo"), rows=300)
        seen = isolation(made.base)
        result.figures, result.tables = figures(cells, times, seen), tables(cells, times, seen)
        result.raw = {"cells": cells, "seconds": times, "seeing": seen}


def figures(
    cells: Sequence[dict[str, Any]], times: Sequence[dict[str, float]], seen: dict[str, tuple[int, int]]
) -> list[Figure]:
    realistic = [cell for cell in cells if DISTRIBUTIONS[cell["name"]].realistic]
    means = [
        statistics.fmean(cell["share"][OURS] for cell in realistic if cell["seq_len"] == seq_len)
        for seq_len in sorted({cell["seq_len"] for cell in realistic})
    ]
    shares = [cell["share"] for cell in cells]
    beside = [one[OURS] / one[THEIRS] for one in shares]
    form = "{:.4f}"
    seq_lens = ", ".join(map(str, SEQ_LENS))
    return [
        Figure(f"share that is no padding, mean of four distributions (seq_len {seq_lens})", means, at_least=0.98,
               form=form),
        Figure("that share, ray-ft ÷ TRL, each distribution and seq_len", beside, at_least=1.0, form=form),
        Figure("the least of these", [min(beside)], at_least=0.999, form=form),
        Figure("that share, ray-ft ÷ TRL given all at once", [one[OURS] / one[AT_ONCE] for one in shares], form=form),
        Figure("that share, ray-ft ÷ the bound", [one[OURS] / one["bound"] for one in shares], form=form),
        Figure("seconds to pack, ray-ft ÷ TRL", ratios(times, OURS, THEIRS)),
        *(Figure(f"documents that see another, of {count}: {side}", [number], form="{:.0f}",
                 at_most=0 if side.startswith(OURS) else None)
          for side, (number, count) in seen.items() if side.endswith("sdpa")),
    ]  # fmt: skip


def tables(
    cells: Sequence[dict[str, Any]], times: Sequence[dict[str, float]], seen: dict[str, tuple[int, int]]
) -> list[Table]:
    sides = (OURS, THEIRS, AT_ONCE, "bound")
    rows = [
        [cell["seq_len"], cell["name"], f"{cell['samples']:,}", *(f"{cell['share'][side]:.4f}" for side in sides)]
        for cell in cells
    ]
    seconds = [[side, spread([pair[side] for pair in times], "{:.2f}")] for side in (OURS, THEIRS)]
    return [
        Table("share that is no padding", ["seq_len", "lengths", "samples", *sides[:3], "at most"], rows),
        Table(f"seconds to pack {SAMPLES:,} samples, {TIMED[0]} at {TIMED[1]}", ["", "seconds"], seconds),
        Table(
            "documents that see another",
            ["", "see another", "of"],
            [[side, number, count] for side, (number, count) in seen.items()],
        ),
    ]


if __name__ == "__main__":
    main()
