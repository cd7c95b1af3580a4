"""Steps of the product's own loop on mock rows, timed one by one.

Built by `ray_ft.train.worker.build`, run by `ray_ft.train.loop.train`: forward, backward, clipping, update and all that
a step reads back, as in `ray-ft train` with `train.workers: 0`. What is not there: rows from files (they are made
before), evaluation, checkpoints. Weights are random, as a product's time does not depend on what they mean: normal
with the deviation 0.02 of Gemma's own initialisation; norms are zero, which for Gemma is a factor of one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

WARM_UP = 2
BATCHES = 4  # different ones, taken in turn
MOST = 100  # steps of a case

#: Rows of metrics so far, each with `at`, the time at which its step was done.
Rows = list[dict[str, float]]


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

    def run(
        self,
        steps: int,
        seq_len: int,
        enough: Callable[[Rows], bool] = lambda _: False,
        each: Callable[[Rows], None] = lambda _: None,
        seed: int = 0,
    ) -> Rows:
        """Steps from the first on.

        Args:
            enough: asked within a step, with the rows of those before; true: the step is the last.
            each: called after each step.
        """
        recipe, link = self.recipe, _Clocked(self.device, enough, each)
        rows = mock_rows(self.case.rows * BATCHES, seq_len, self.words, self.case.documents, seed)
        counts = Counts(packed=recipe.train.global_batch * steps)
        order = Order.of(recipe, Prepared("mock", seq_len, counts, (Unit(0, 0, counts.packed),), ()))
        meter = Meter(self.layout, self.flops)
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

    def __init__(self, device: torch.device, enough: Callable[[Rows], bool], each: Callable[[Rows], None]) -> None:
        self._device, self._enough, self._each = device, enough, each
        self.rows: Rows = []

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        raise AssertionError("only a run with checkpoints says that it begins")

    def say(self, line: str) -> None:
        print(line)

    def log(self, row: dict[str, float]) -> None:
        devices.wait(self._device)
        self.rows.append({**row, "at": time.monotonic()})
        self._each(self.rows)

    def asked(self) -> Ask:
        return Ask.DROP if self._enough(self.rows) else Ask.NOTHING


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


def durations(rows: Rows) -> list[float]:
    """Seconds of each step after the first, whose beginning is not known."""
    times = [row["at"] for row in rows]
    return [after - before for before, after in itertools.pairwise(times)]


def is_last(rows: Rows, steps: int, seconds: float, until: float) -> bool:
    """Whether the step that is under way should be the last, by the rows of those before.

    It is where with it `steps` are timed, and `seconds`; or where after it less would be left until `until` than one
    and a half of the longest. The first step says nothing of how long one takes: it may compile.
    """
    took = durations(rows)
    if not took:
        return bool(rows) and time.monotonic() > until
    timed = took[WARM_UP - 1 :]
    if len(timed) + 1 >= steps and sum(timed) + took[-1] >= seconds and len(rows) >= WARM_UP:
        return True
    return until - rows[-1]["at"] < 2.5 * max(took)


def measured(case: Case, setting: Setting) -> dict[str, Any]:
    """Emits a row about a case at each timed step, each with all so far: seconds of the steps, peak memory, FLOPs per
    token, the first and the last loss. Returns the last.

    Raises:
        RuntimeError: not one step was timed before the time was over, or a loss is no number.
    """
    device = torch.device(setting.device)
    began = time.monotonic()
    ready = Built(case, device, setting.folder / "model", setting.small, MOST)
    devices.wait(device)
    devices.forget_peak(device)
    about = {
        "case": case.name,
        "settings": case.said,
        "tokens": case.rows * case.seq_len,
        "built_seconds": time.monotonic() - began,
        "flops": ready.flops,
        "score_flops": ready.score_flops,
        "clip": ready.recipe.train.clip_norm,
        "attention": next(line for line in ready.built.lines if line.startswith("attention")),
    }
    row: dict[str, Any] = {}

    def each(rows: Rows) -> None:
        nonlocal row
        losses = [rows[0]["loss"], rows[-1]["loss"]]
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"a loss is no number: {losses}")
        if timed := durations(rows)[WARM_UP - 1 :]:
            row = {**about, "step_seconds": timed, "loss": losses, **devices.peak(device)}
            setting.emit(row)

    rows = ready.run(
        MOST,
        case.seq_len,
        lambda rows: is_last(rows, setting.steps, setting.seconds, setting.until),
        each,
    )
    if not row:
        raise RuntimeError(f"the time was over after {len(rows)} steps, {WARM_UP} of which would be warm-up")
    return row
