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

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pairs import interleaved, ratios, spread
from benchmarks.peers import packages
from benchmarks.result import Figure, Table, options, recorded
from ray_ft import demo, recipe
from ray_ft.data import pack, stream
from ray_ft.data.prepare import SEGMENT_TOKENS, prepare
from ray_ft.data.render import Tokens
from ray_ft.model.loss import documents
from ray_ft.train.objective import tensors

SAMPLES = 100_000  # of each distribution, at most
TOKENS = 4_000_000  # of each distribution, at most: two segments
SEQ_LENS = (256, 1024, 4096)
TIMED = ("chat", 1024)  # distribution and seq_len whose packing is timed, with all SAMPLES
OURS, THEIRS, AT_ONCE = "ray-ft", "TRL", "TRL, all at once"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("n", "st", "rk", "nd", "ls"))  # 4.6 bytes each


# ------------------------------------------------------------------------------------------------------------ lengths


@dataclass(frozen=True)
class Lengths:
    """A distribution of samples' tokens.

    Attributes:
        about: for people.
        draw: lengths from (generator, how many, seq_len), still without bounds.
        realistic: whether it counts in the mean; the others show what no packing can do.
    """

    about: str
    draw: Callable[[np.random.Generator, int, int], np.ndarray]
    realistic: bool = True


def _lognormal(median: float, sigma: float) -> Callable[[np.random.Generator, int, int], np.ndarray]:
    return lambda rng, count, seq_len: rng.lognormal(np.log(median), sigma, count)


DISTRIBUTIONS = {
    "demo": Lengths("normal, mean 33, deviation 7: the demo's", lambda rng, n, _: rng.normal(33, 7, n)),
    "chat": Lengths("lognormal, median 200, σ 0.9", _lognormal(200, 0.9)),
    "long tail": Lengths("lognormal, median 400, σ 1.5: many at seq_len", _lognormal(400, 1.5)),
    "labels": Lengths("lognormal, median 24, σ 0.4", _lognormal(24, 0.4)),
    "over half": Lengths("even from 0.5 to 1 × seq_len: no two share a row", lambda rng, n, s: rng.uniform(
        0.5, 1, n) * s, realistic=False),
}  # fmt: skip


def drawn(name: str, seq_len: int, seed: int, samples: int = SAMPLES, tokens: int = TOKENS) -> np.ndarray:
    """Lengths, int64: as many samples as both limits allow; longer ones are cut to seq_len, as both sides would."""
    rng = np.random.default_rng(seed)
    low = seq_len // 2 + 1 if name == "over half" else 4
    found = np.clip(DISTRIBUTIONS[name].draw(rng, samples, seq_len).round().astype(np.int64), low, seq_len)
    return found[: max(int(np.searchsorted(np.cumsum(found), tokens)), 1)]


def fewest(lengths: np.ndarray, seq_len: int) -> int:
    """Rows that any packing needs at least, without splitting a sample.

    Martello and Toth's bound L2 (Knapsack Problems, 1990, section 8.3.2): samples longer than half a row need one each;
    what of the others does not fit beside them needs more. With a limit of 0 it is at least ⌈tokens ÷ seq_len⌉.
    """
    counts = np.bincount(lengths, minlength=seq_len + 1)
    number, total = np.cumsum(counts), np.cumsum(counts * np.arange(seq_len + 1))
    half = seq_len // 2
    best = 0
    for limit in range(half + 1):  # samples shorter than it are left out
        alone = number[-1] - number[seq_len - limit]  # beside these not even one of `limit` fits
        large = number[seq_len - limit] - number[half]
        room = large * seq_len - (total[seq_len - limit] - total[half])
        small = total[half] - (total[limit - 1] if limit else 0)
        best = max(best, int(alone + large + max(0, -(-(small - room) // seq_len))))
    return best


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


# --------------------------------------------------------------------------------------------------------- isolation


def seeing(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, spans: Sequence[slice]) -> int:
    """How many documents see another: whose logits are not the same bits once all tokens of that other one changed.

    Args:
        logits: [tokens, vocabulary] of ids, int64 [tokens].
        spans: of the documents.

    Raises:
        ValueError: the logits of the same ids are not the same, so that nothing can be told.
    """
    before = logits(ids)
    if not torch.equal(before, logits(ids)):
        raise ValueError("two passes over the same tokens differ: what a document sees cannot be told from bits")
    found = set()
    for changed in spans:
        others = ids.clone()
        others[changed] = (others[changed] + 7) % before.shape[-1]
        after = logits(others)
        assert not torch.equal(before[changed], after[changed])
        found |= {at for at, one in enumerate(spans) if one != changed and not torch.equal(before[one], after[one])}
    return len(found)


def isolation(base: str, seq_len: int = 128, count: int = 24) -> dict[str, tuple[int, int]]:
    """(documents that see another, documents) in packed rows of each side, by implementation of attention."""
    from transformers import AutoModelForCausalLM

    from benchmarks.peers import trl_pack

    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, count)
    samples = [Tokens(rng.integers(6, 500, n, dtype=np.int32), np.ones(n, bool)) for n in lengths]
    rows, _ = pack.pack(samples, seq_len, packing=True, pad_id=0)
    theirs = trl_pack.packed(trl_pack.dataset(np.concatenate([one.ids for one in samples]), lengths), seq_len)
    found = {}
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention).eval()
        with torch.no_grad():
            found[f"{OURS}, {attention}"] = seeing(_ours(model, rows), *_documents(rows)), count
            given = trl_pack.batch(theirs, 0)
            spans = _spans(given["position_ids"][0].numpy())
            ids = given["input_ids"][0]
            found[f"{THEIRS}, {attention}"] = seeing(_theirs(model, given), ids, spans), count
            if attention == "sdpa":  # that the check finds what it looks for
                plain = lambda ids, model=model: model(ids[None], use_cache=False).logits[0]  # noqa: E731
                found["control: positions that run on"] = seeing(plain, ids, spans), count
    return found


def _documents(rows: pack.Rows) -> tuple[torch.Tensor, list[slice]]:
    """All tokens of some rows, one row after the other, and where real documents lie among them."""
    flags = rows.flags.reshape(-1)
    spans = [one for one in _spans(pack.position_ids(rows.flags).reshape(-1)) if flags[one.start] & pack.REAL]
    return torch.from_numpy(rows.input_ids.reshape(-1).astype(np.int64)), spans


def _spans(positions: np.ndarray) -> list[slice]:
    edges = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _ours(model: Any, rows: pack.Rows) -> Callable[[torch.Tensor], torch.Tensor]:
    """As `ray_ft.model.loss.LossModel` calls the model."""
    _, positions, _ = tensors(rows, torch.device("cpu"))
    width = rows.flags.shape[1]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        given = ids.view(-1, width)[:, : positions.shape[1]]
        hidden = model.get_decoder()(input_ids=given, use_cache=False, **documents(model, positions)).last_hidden_state
        return model.get_output_embeddings()(hidden).flatten(0, 1)

    assert positions.shape[1] == width, "these rows are full enough that no column is left out"
    return logits


def _theirs(model: Any, given: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    from benchmarks.peers import trl_pack

    return lambda ids: trl_pack.logits(model, given, ids[None])[0]


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
