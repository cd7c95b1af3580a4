"""Steps of the product's own loop on mock rows, timed one by one.

Built by `ray_ft.train.worker.build`, run by `ray_ft.train.loop.train`: forward, backward, clipping, update and all that
a step reads back, as in `ray-ft train` with `train.workers: 0`. What is not there: rows from files (they are made
before), evaluation, checkpoints. Weights are random, as a product's time does not depend on what they mean: normal
with the deviation 0.02 of Gemma's own initialisation; norms are zero, which for Gemma is a factor of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu import patches
from benchmarks.gpu.cases import Case, config_of, recipe_of
from ray_ft.data import pack
from ray_ft.data.counts import Counts
from ray_ft.data.order import Order
from ray_ft.data.prepared import Prepared, Unit
from ray_ft.data.stream import Batch
from ray_ft.model import adapter, load
from ray_ft.plan import shapes, speed
from ray_ft.span import Span
from ray_ft.strategy.base import Layout
from ray_ft.train import worker
from ray_ft.train.asks import Ask
from ray_ft.train.loop import train
from ray_ft.train.metrics import Meter

WARM_UP = 3
BATCHES = 4  # different ones, taken in turn


@torch.no_grad()
def random_weights(model: Any, folder: str, spans: Mapping[str, Span]) -> None:
    """In place of `load.fill`: nothing is read. An adapter's own values are set by whoever builds."""
    for name, span in spans.items():
        if adapter.stored_name(name) is None:
            continue
        if len(span.shape) > 1:
            span.data.normal_(0.0, 0.02)
        else:
            span.data.zero_()
    load.compute_buffers(model)


class Built:
    """A case's model on a device with its optimizer, ready to train.

    Args:
        folder: for its config.json.
        small: in place of the case's true size.
    """

    def __init__(self, case: Case, device: torch.device, folder: Path, small: bool, steps: int) -> None:
        config = config_of(case.size, small)
        config.save_pretrained(folder)
        self.case, self.device = case, device
        self.recipe = recipe_of(case, folder, steps)
        self.words = config.get_text_config().vocab_size
        patches.before(case.patches)
        torch.manual_seed(self.recipe.run.seed)
        self.layout = Layout(0, 1, device, torch.bfloat16)  # also on CPU: the code that a GPU runs
        self.built = worker.build(self.recipe, self.layout, base=random_weights)
        patches.after(case.patches, self.built.strategy.module)
        scores = speed.score_flops(shapes.attended(config.get_text_config(), case.seq_len), case.seq_len)
        self.flops, self.score_flops = self.built.flops_per_token, 3 * scores

    def run(self, steps: int, seq_len: int, until: Callable[[], bool], seed: int = 0) -> list[dict[str, float]]:
        """Steps from the first on; fewer where `until` says that it is enough. Returns rows of metrics with `at`, the
        time at which each was done."""
        recipe, link = self.recipe, _Clocked(self.device, until)
        rows = mock_rows(self.case.rows * BATCHES, seq_len, self.words, self.case.documents, seed)
        counts = Counts(packed=recipe.train.global_batch * steps)
        order = Order.of(recipe, Prepared("mock", seq_len, counts, (Unit(0, 0, counts.packed),), ()))
        meter = Meter(self.layout, self.flops)
        link.began = time.perf_counter()
        with patches.training(self.case.patches):
            train(
                self.built.strategy, batches(rows, self.case.rows), order, None, recipe.train, 0, steps,
                _Nothing(), link, meter,  # type: ignore[arg-type]
            )  # fmt: skip
        return link.rows


def mock_rows(count: int, seq_len: int, words: int, documents: int, seed: int) -> pack.Rows:
    """Full rows of random tokens, each of them a target: `documents` of equal length in a row, which do not see each
    other."""
    ids = np.random.default_rng(seed).integers(0, words - 8, (count, seq_len), dtype=np.int32)
    flags = np.full((count, seq_len), pack.REAL | pack.TRAINED, np.uint8)
    for document in range(documents):
        flags[:, document * seq_len // documents] = pack.REAL | pack.START
    return pack.Rows(ids, flags)


def batches(rows: pack.Rows, size: int) -> Iterator[Batch]:
    """Without end, the same few in turn."""
    first = 0
    while True:
        start = first % len(rows)
        yield Batch(first, rows.take(slice(start, start + size)))
        first += size


class _Clocked:
    """The loop's link: takes the time of each step once the device is done with it."""

    def __init__(self, device: torch.device, until: Callable[[], bool]) -> None:
        self._device, self._until = device, until
        self.rows: list[dict[str, float]] = []
        self.began = 0.0

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        raise AssertionError("only a run with checkpoints says that it begins")

    def say(self, line: str) -> None:
        print(line)

    def log(self, row: dict[str, float]) -> None:
        devices.wait(self._device)
        self.rows.append({**row, "at": time.perf_counter()})

    def asked(self) -> Ask:
        return Ask.DROP if self._until() else Ask.NOTHING


class _Nothing:
    """In place of what keeps checkpoints and the ledger."""

    def signals(self) -> tuple[float, ...]:
        return ()

    def advance(self, sums: list[float]) -> None: ...

    def used(self, step: int, batch: Batch) -> None: ...

    def noted(self, row: dict[str, float]) -> None: ...

    def save(self, step: int, wait: bool) -> bool:
        return True

    def check(self, step: int, needed: bool) -> None: ...


def measured(
    case: Case, device: torch.device, folder: Path, small: bool, steps: int, until: Callable[[], bool]
) -> dict[str, Any]:
    """A row about a case: seconds of each timed step, peak memory, FLOPs per token, the first and the last loss.

    Raises:
        RuntimeError: not one step was timed before `until` said that the time is over, or a loss is no number.
    """
    began = time.perf_counter()
    ready = Built(case, device, folder, small, WARM_UP + steps)
    devices.wait(device)
    built_seconds = time.perf_counter() - began
    devices.forget_peak(device)
    rows = ready.run(WARM_UP + steps, case.seq_len, until)
    times = [row["at"] for row in rows]
    seconds = [after - before for before, after in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]
    if not seconds:
        raise RuntimeError(f"the time was over after {len(rows)} steps, {WARM_UP} of which would be warm-up")
    losses = [row["loss"] for row in rows]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"a loss is no number: {losses}")
    settings = ready.recipe.train
    return {
        "tokens": case.rows * case.seq_len,
        "step_seconds": seconds,
        "built_seconds": built_seconds,
        "flops": ready.flops,
        "score_flops": ready.score_flops,
        "loss": [losses[0], losses[-1]],
        "clip": settings.clip_norm,
        "attention": next(line for line in ready.built.lines if line.startswith("attention")),
        **devices.peak(device),
    }
