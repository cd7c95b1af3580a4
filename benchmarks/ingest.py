"""Rows to packed rows: ray-ft's ingest against `tokenizers` alone and against `datasets.map` with TRL's packing.

    python -m benchmarks.ingest [--pairs 8] [--parts memory,rates,loader] [--megabytes 50] [--sizes 50MB,500MB]

Three comparisons on conversations whose every row fits, with as many processes as the machine has cores:

- tokens/s. ray-ft's is the way that `ray-ft train` takes: files are found, each row is read, checked, rendered,
  tokenized with its loss mask, hashed, packed and written. `tokenizers` has the rendered texts in memory and does
  nothing but encode them; `datasets.map` renders, tokenizes, packs and writes, without mask, check or count. With an
  aim where Ray is up and its processes have worked before (warm), as the peers' clocks begin with everything imported;
  from a command's start it is shown as well.
- memory at its peak of all processes together, for inputs of several sizes.
- the rate of training with rows from Ray Data and with the same rows held in memory, in the product's own loop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import conversations, ingest_run, processes
from benchmarks.pairs import interleaved, ratios
from benchmarks.peers import packages
from benchmarks.result import Figure, Result, Table, options, recorded
from ray_ft import session
from ray_ft.data.render import Renderer, load_tokenizer
from ray_ft.data.rows import to_sample
from ray_ft.data.sources import chunks_of, find_files, read_rows
from ray_ft.recipe import Recipe

PEERS = Path(__file__).parent / "peers"
WARM_UP = 10  # steps of a training run before its clock counts
FIRST = ("auto", "off")  # data.cache
TRAINED = 9_000_000  # bytes of conversations for training: two chunks, and more rows than are used
PARTS = ("memory", "rates", "loader")


def main() -> None:
    parser = options(__doc__, pairs=8)
    parser.add_argument("--megabytes", type=float, default=50, help="of conversations, for tokens/s; default: 50")
    parser.add_argument("--sizes", default="50MB,500MB", help="of the inputs whose memory is measured, ascending")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is measured; default: everything")
    parser.add_argument("--steps", type=int, default=20, help="of a training run, with 10 of warm-up; default: 20")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    sizes = {name: conversations.size(name) for name in given.sizes.split(",")}
    if given.steps <= WARM_UP:
        parser.error(f"--steps has to be more than {WARM_UP}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    conditions = {
        "data": f"generated conversations of 2 or 4 turns, {given.megabytes:g} MB, and sentences, a third of it in a "
        f"quarter of the pairs; the demo's byte-level BPE, Gemma 3's template, seq_len {conversations.SEQ_LEN}",
        "threads": f"{cores} processes of one thread each on every side; training: one thread, loading beside it",
        "flops": "none",
        "clipping": "none in ingest; 1.0 in training",
        "padding": "not counted: real tokens alone, of which all sides have the same number",
        "loss mask": "ray-ft alone makes one",
    }
    compared = (
        "ray-ft's ingest on Ray ÷ tokenizers.encode_batch on texts in memory, and ÷ datasets.map with TRL's packing"
    )
    with (
        recorded("ingest", compared, conditions, given, [packages.folder()]) as result,
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
    ):
        bench = Bench(Path(scratch), cores, given)
        if "memory" in parts:  # first: each of its runs has a Ray of its own
            bench.measure_memory(result, sizes)
        if set(parts) - {"memory"}:
            with session.connected():
                if "rates" in parts:
                    bench.measure_rates(result)
                if "loader" in parts:
                    bench.measure_loader(result)


class Bench:
    """One run of the benchmark; everything that it writes lies in `scratch`."""

    def __init__(self, scratch: Path, cores: int, given: argparse.Namespace) -> None:
        self._scratch, self._cores, self._given = scratch, cores, given
        self._model = conversations.demo(str(scratch / "demo")).base
        self._words = conversations.words()
        self._environment = packages.environment(threads=1)
        self._number = 0

    def measure_rates(self, result: Result) -> None:
        """tokens/s of all sides, with Ray up."""
        raw = {}
        for kind, share, pairs in (
            ("conversations", 1, self._given.pairs),
            ("sentences", 3, max(self._given.pairs // 4, 1)),
        ):
            data = self._scratch / f"{kind}.jsonl"
            conversations.write(data, kind, int(self._given.megabytes * 1e6 / share), self._words)
            texts = self._scratch / f"{kind}.texts.jsonl"
            write_texts(texts, self._settings(data, self._scratch), self._model)
            arms = {
                "ray-ft": lambda number, data=data: self._ours(data),
                "tokenizers": lambda number, texts=texts: self._peer("raw_tokenizers", texts=str(texts)),
                "datasets": lambda number, data=data: self._peer(
                    "hf_map", data=str(data), seq_len=conversations.SEQ_LEN
                ),
            }
            found = interleaved(arms, pairs, 1, show=said)
            same_tokens(found)
            result.figures += rate_figures(kind, found)
            rows = sum(1 for _ in data.open("rb"))
            raw[kind] = {"pairs": found, "rows": rows, "tokens a row": found[0]["ray-ft"]["tokens"] / rows}
        result.tables.append(rate_table(raw))
        result.raw = {**(result.raw or {}), "rates": raw}

    def measure_memory(self, result: Result, sizes: Mapping[str, int]) -> None:
        """Peaks for inputs of several sizes, and when the first batch is there; a Ray of its own for each run."""
        peaks, found = {}, {}
        for name, size in sizes.items():
            data = self._scratch / "memory.jsonl"
            conversations.write(data, "conversations", size, self._words)
            for cache in FIRST if name == next(iter(sizes)) else FIRST[:1]:
                began = time.time()
                settings = {"data": str(data), "cache": cache}
                peak, report = self._alone(settings)
                report |= {"from the start": report["ready"] - began, "bytes": size}
                found[f"{name}, data.cache {cache}"] = report
                if cache == "auto":
                    peaks[name] = peak
                print(
                    f"{name}, data.cache {cache}: {peak.shared_once / 2**20:,.0f} MiB at most, {report}",
                    file=sys.stderr,
                )
            data.unlink()
        result.figures += memory_figures(peaks) + first_figures(found)
        result.tables.append(memory_table(peaks, found))
        result.raw = {"memory": {name: vars(peak) for name, peak in peaks.items()}, "first batch": found}

    def measure_loader(self, result: Result) -> None:
        """Training's rate with Ray Data's rows and with the same in memory."""
        data = self._scratch / "training.jsonl"
        conversations.write(data, "conversations", TRAINED, self._words)
        arms = {
            "Ray Data": lambda number: self._training(data, False),
            "memory": lambda number: self._training(data, True),
        }
        pairs = interleaved(arms, self._given.pairs, 1, show=lambda pair: f"steps/s {pair}")
        result.figures.append(
            Figure(
                "training steps/s, rows from Ray Data ÷ held in memory",
                ratios(pairs, "Ray Data", "memory"),
                at_least=0.99,
            )
        )
        result.raw = {**(result.raw or {}), "loader": pairs}

    def _settings(self, data: Path, storage: Path, **more: Any) -> Recipe:
        return ingest_run.settings(data, self._model, storage, **more)

    def _storage(self) -> Path:
        self._number += 1
        return self._scratch / f"runs-{self._number}"

    def _ours(self, data: Path) -> dict[str, float]:
        storage = self._storage()
        job, seconds = ingest_run.ingest(self._settings(data, storage))
        shutil.rmtree(storage)
        return {"tokens": job.train.counts.tokens, "seconds": seconds, "rows": job.train.rows}

    def _peer(self, script: str, **settings: Any) -> dict[str, float]:
        folder = self._scratch / "peer"
        folder.mkdir()
        file, told = folder / "result.json", folder / "settings.json"
        common = {"model": self._model, "processes": self._cores, "folder": str(folder), "result": str(file)}
        told.write_text(json.dumps({**common, **settings}))
        command = [sys.executable, str(PEERS / f"{script}.py"), str(told)]
        if subprocess.run(command, env=self._environment, stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"{script}.py failed")
        found = json.loads(file.read_text())
        shutil.rmtree(folder)
        return found

    def _alone(self, settings: dict[str, Any]) -> tuple[processes.Peak, dict[str, float]]:
        storage = self._storage()
        storage.mkdir()
        told, file = storage / "settings.json", storage / "result.json"
        told.write_text(json.dumps({**settings, "model": self._model, "storage": str(storage), "result": str(file)}))
        command = [sys.executable, "-m", "benchmarks.ingest_run", str(told)]
        peak, _ = processes.peak_of(command, os.environ)
        report = json.loads(file.read_text())
        shutil.rmtree(storage)
        return peak, report

    def _training(self, data: Path, held: bool) -> float:
        """Steps per second after the warm-up."""
        steps, storage = self._given.steps, self._scratch / "training"
        wanted = self._settings(
            data, storage, max_steps=steps, log_every=1, optimizer={"lr": 1e-3}, checkpoint={"every": steps}
        )
        job, _ = ingest_run.ingest(wanted)  # prepared once, found again
        batches = list(ingest_run.streamed(job.order, 0, steps)) if held else None
        rows = ingest_run.train(job, batches)
        shutil.rmtree(wanted.run.dir.root)
        return (steps - WARM_UP) / sum(row["step_seconds"] for row in rows[WARM_UP:])


def write_texts(file: Path, recipe: Recipe, model: str) -> None:
    """The rendered texts of all rows, as JSON lines."""
    tokenizer = load_tokenizer(model)
    renderer, source = Renderer(tokenizer), recipe.data.train[0]
    with file.open("w", encoding="utf-8") as out:
        for found in find_files(source):
            for chunk in chunks_of(found, 0):
                for row in read_rows(chunk):
                    sample = to_sample(source, row.content, renderer.special)  # type: ignore[arg-type]
                    turns = list(sample.turns)  # type: ignore[union-attr]
                    out.write(json.dumps(tokenizer.apply_chat_template(turns, tokenize=False)) + "\n")


def same_tokens(pairs: Sequence[Mapping[str, Any]]) -> None:
    """Exits unless all sides made as many tokens, each time."""
    counts = {name: sorted({pair[name]["tokens"] for pair in pairs}) for name in pairs[0]}
    if len({count for found in counts.values() for count in found}) > 1:
        sys.exit(f"the sides made different numbers of tokens, so their rates do not compare: {counts}")


def rate(arm: Mapping[str, float]) -> float:
    """Tokens per second."""
    return arm["tokens"] / arm["seconds"]


def said(pair: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {rate(arm):,.0f} tokens/s" for name, arm in pair.items())


def rate_figures(kind: str, pairs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    rates = [{name: rate(arm) for name, arm in pair.items()} for pair in pairs]
    return [
        Figure(
            f"tokens/s of {kind}, warm, ray-ft ÷ tokenizers alone", ratios(rates, "ray-ft", "tokenizers"), at_least=0.8
        ),
        Figure(
            f"tokens/s of {kind}, warm, ray-ft ÷ datasets.map and TRL",
            ratios(rates, "ray-ft", "datasets"),
            at_least=1.3,
        ),
    ]


def rate_table(raw: Mapping[str, Any]) -> Table:
    rows = [
        [
            kind,
            f"{found['rows']:,}",
            f"{found['tokens a row']:.0f}",
            name,
            f"{statistics.median(rate(pair[name]) for pair in found['pairs']):,.0f}",
        ]
        for kind, found in raw.items()
        for name in found["pairs"][0]
    ]
    return Table("tokens/s, median", ["rows of", "rows", "tokens a row", "side", "tokens/s"], rows)


def memory_figures(peaks: Mapping[str, processes.Peak]) -> list[Figure]:
    """Largest ÷ smallest input, where there are two."""
    if len(peaks) < 2:
        return []
    first, last = next(iter(peaks)), list(peaks)[-1]
    grown = peaks[last].shared_once / peaks[first].shared_once
    return [Figure(f"peak memory of all processes, {last} ÷ {first}", [grown], at_most=1.3)]


def first_figures(found: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """Seconds from the start of the ingest to the first batch ÷ those of the whole preparation."""
    return [
        Figure(f"first batch ÷ whole preparation, {name}", [(one["prepared"] + one["first"]) / one["prepared"]])
        for name, one in found.items()
    ]


def memory_table(peaks: Mapping[str, processes.Peak], found: Mapping[str, Mapping[str, float]]) -> Table:
    rows = []
    for name, one in found.items():
        peak = peaks.get(name.split(",")[0]) if name.endswith("auto") else None
        mib = [f"{value / 2**20:,.0f}" for value in (peak.shared_once, peak.resident, peak.alone)] if peak else [""] * 3
        cold = one["tokens"] / one["from the start"]
        rows.append(
            [
                name,
                *mib,
                f"{one['prepared']:.1f}",
                f"{one['prepared'] + one['first']:.1f}",
                f"{one['from the start']:.1f}",
                f"{cold:,.0f}",
            ]
        )
    columns = [
        "input", "MiB, shared pages once", "RSS summed", "largest process", "s, preparation",
        "s, to the first batch", "s, from the command's start", "tokens/s, cold",
    ]  # fmt: skip
    return Table("one run each, a private Ray started for it", columns, rows)


if __name__ == "__main__":
    main()
