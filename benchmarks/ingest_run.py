"""ray-ft's side of `ingest.py`: the way from rows to packed rows that `ray-ft train` takes, on Ray.

As a program it is one ingest in a process of its own, with a private Ray of its own:
    python -m benchmarks.ingest_run SETTINGS.json     (data, model, storage, cache, result)
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.conversations import SEQ_LEN
from ray_ft import recipe, session
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.strategy import Layout
from ray_ft.train import worker
from ray_ft.train.asks import Ask
from ray_ft.train.launch import prepare_job
from ray_ft.train.schedule import total_steps
from ray_ft.view import View

BATCH = 2  # rows of a step: few, so that steps are short and what loading costs in each of them shows


def settings(data: Path, model: str, storage: Path, *, cache: str = "auto", **train: Any) -> recipe.Recipe:
    """A recipe with everything else as it is by default."""
    return recipe.parse(
        {
            "run": {"name": "bench", "storage": str(storage)},
            "model": {"path": model},
            "data": {
                "train": [{"path": str(data), "format": "messages"}],
                "seq_len": SEQ_LEN,
                "cache": cache,
            },
            "train": {"workers": 1, "global_batch": BATCH, "micro_batch": BATCH, **train},
        }
    )


def ingest(wanted: recipe.Recipe) -> tuple[worker.Job, float]:
    """Prepare the recipe's data on the connected Ray; and the seconds that it took. Exits where a row was not used."""
    began = time.monotonic()
    job = prepare_job(wanted, View(Console(file=io.StringIO())), stream.spread)
    seconds = time.monotonic() - began
    counts = job.train.counts
    if counts.used != counts.rows or counts.truncated:
        sys.exit(f"{counts.rows - counts.used} rows were rejected and {counts.truncated} cut: the sides would differ")
    return job, seconds


def streamed(order: Order, start: int, total: int) -> Iterator[stream.Batch]:
    """The batches of steps [start, total) by Ray Data, dealt out as to a single worker."""
    rows = stream.training_dataset(order, start * BATCH, total * BATCH)
    (shard,) = stream.deal(rows, 1, BATCH, stream.in_order(None))
    return stream.batches(shard, order, start * BATCH, 0, 1, BATCH)


class Steps:
    """What a run reports: the seconds of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None: ...

    def say(self, line: str) -> None: ...

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def asked(self) -> Ask:
        return Ask.NOTHING


def train(job: worker.Job, held: Iterable[stream.Batch] | None) -> list[dict[str, float]]:
    """The product's loop in this process, one thread; its metrics, a row for each step.

    Args:
        held: batches that are given out in place of those that Ray Data delivers; None: Ray Data delivers them.
    """
    torch.set_num_threads(1)
    alone = dataclasses.replace(job, recipe=job.recipe.sized(0))
    steps = Steps()
    source = streamed if held is None else lambda order, start, total: held
    worker.run(alone, job.start(), Layout(0, 1, torch.device("cpu"), torch.float32), source, steps)
    return steps.rows


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    with session.connected():
        wanted = settings(Path(given["data"]), given["model"], Path(given["storage"]), cache=given["cache"])
        job, prepared = ingest(wanted)
        ready = time.time()
        began = time.monotonic()
        with contextlib.closing(streamed(job.order, 0, total_steps(wanted, job.order))) as batches:
            next(batches)
            first = time.monotonic() - began
        tokens = job.train.counts.tokens
    found = {"tokens": tokens, "prepared": prepared, "first": first, "ready": ready, "rows": job.train.counts.rows}
    Path(given["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
