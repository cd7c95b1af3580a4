"""The product's training in this process, without Ray, one step and one save at a time, as its loop makes them."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ray_ft import demo, recipe
from ray_ft.data import pack
from ray_ft.data.render import Tokens
from ray_ft.data.stream import Batch
from ray_ft.strategy import Layout
from ray_ft.train import checkpoint, shards, worker
from ray_ft.train.keeper import Keeper
from ray_ft.train.loop import train_step
from ray_ft.train.saver import Saver

ROWS, SEQ_LEN = 4, 32  # of a step


@dataclass(frozen=True)
class Stretch:
    """Some steps: the seconds of each without those that it waited for a copy, of all with everything between them,
    how many saves began, and how long they were copied and written beside the steps."""

    steps: list[float]
    seconds: float
    saves: int
    writing: float


class Training:
    """A run of the product in this process, without Ray: what its loop does between two steps, and nothing else."""

    def __init__(self, folder: str, width: int, layers: int) -> None:
        made = demo.write_demo(os.path.join(folder, "demo"), rows=300, hidden_size=width, layers=layers)
        content = {
            "run": {"name": "run", "storage": os.path.join(folder, "runs")},
            "model": {"path": made.base},
            "data": {
                "train": [{"path": list(made.train), "format": "translation", "prompt": demo.PROMPT}],
                "seq_len": SEQ_LEN,
            },
            "train": {"workers": 0, "global_batch": ROWS, "micro_batch": ROWS, "checkpoint": {"keep": 1}},
        }
        self._recipe = recipe.parse(content)
        self._strategy = worker.build(self._recipe, Layout(0, 1, torch.device("cpu"), torch.float32)).strategy
        self.folder = self._recipe.run.dir.checkpoints
        saver = Saver(self.folder, 1, 0, 1, {}, True, lambda line: sys.exit(f"a save failed: {line}"), folder)
        self._keeper = Keeper(saver, self.spans, partial(worker.sum_over_workers, self._strategy), resting=True)
        rng = np.random.default_rng(0)
        samples = [Tokens(rng.integers(6, 500, SEQ_LEN).astype(np.int32), np.ones(SEQ_LEN, bool)) for _ in range(ROWS)]
        self._batch = Batch(0, pack.pack(samples, SEQ_LEN, packing=False, pad_id=0)[0])
        self._write = shards.write
        shards.write = self._noting_the_end
        self._finished = 0
        self._ends: list[float] = []  # when the thread had copied and written its part of each save
        self.waited = 0.0  # seconds of the last step, before its update, for the copy of a save
        self.step()  # before it, the optimizer has no moments

    def spans(self) -> dict[str, Any]:
        return worker.state(self._strategy)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same tensors by the same names, for the peers."""
        return {name: span.data.detach() for name, span in self.spans().items()}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def step(self) -> float:
        """Take a step as the loop does. Returns its seconds, less those that it `waited`."""
        began = time.perf_counter()
        result = train_step(self._strategy, self._batch, self._recipe.train, 1e-4, self._signals)
        self._keeper.advance(result.notes)
        self._finished += 1
        return time.perf_counter() - began - self.waited

    def _signals(self) -> tuple[float, ...]:
        began = time.perf_counter()
        signals = self._keeper.signals()
        self.waited = time.perf_counter() - began
        return signals

    def _noting_the_end(self, *args: Any) -> Any:
        written = self._write(*args)
        self._ends.append(time.perf_counter())
        return written

    def save(self) -> float:
        """Begin a checkpoint as the loop does. Returns the seconds that this takes."""
        began = time.perf_counter()
        self._keeper.save(self._finished, wait=False)
        return time.perf_counter() - began

    @property
    def pending(self) -> bool:
        return self._keeper.saver.pending is not None

    def settle(self) -> None:
        """Wait until the pending checkpoint is there."""
        self._keeper.saver.finish(self._keeper.all_reduce)

    def restore(self) -> float:
        """Find the newest checkpoint and fill the state from it, as a start of the workers does. Returns seconds."""
        began = time.perf_counter()
        found = checkpoint.newest(self.folder)
        assert found is not None, "no checkpoint was written"
        checkpoint.restore(found.location, self.spans())
        self._strategy.restored()
        return time.perf_counter() - began

    def stretch(self, steps: int, saving: bool) -> Stretch:
        """Take steps; `saving`: a save begins after the first and whenever the one before it is committed."""
        began, taken, begins = time.perf_counter(), [], []
        self._ends.clear()
        for number in range(steps):
            taken.append(self.step())
            if saving and not self.pending and number < steps - 1:
                self.save()
                begins.append(time.perf_counter())
        ended = time.perf_counter()
        self.settle()
        writing = sum(min(end, ended) - begin for begin, end in zip(begins, self._ends, strict=True))
        return Stretch(taken, ended - began, len(begins), writing)

    def close(self) -> None:
        self.settle()
        self._keeper.saver.close()
        shards.write = self._write
