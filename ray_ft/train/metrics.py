"""What is measured while training, and where it is written."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ray_ft import artifacts, paths
from ray_ft.data import pack
from ray_ft.strategy.base import Layout

#: Dense bfloat16 peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device at best, or None where no figure is known (CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


class Meter:
    """Counts since the last row of metrics. Rates are over the time spent training, without evaluating and saving.

    Args:
        flops_per_token: of a training step; see `ray_ft.model.flops`.
    """

    def __init__(self, layout: Layout, flops_per_token: float) -> None:
        self._layout = layout
        self._flops, self._peak = flops_per_token, peak_flops(layout.device)
        self._reset()

    def _reset(self) -> None:
        self._began = self._last = time.perf_counter()
        self._trained = self._wait = 0.0
        self._tokens = self._places = self._steps = 0

    def waited(self, seconds: float) -> None:
        """Time that the step waited for its rows."""
        self._wait += seconds

    def step(self, finished: int, loss: float, norm: float, lr: float, rows: pack.Rows) -> dict[str, float]:
        now = time.perf_counter()
        self._trained += now - self._last
        self._last = now
        self._tokens += int(np.count_nonzero(rows.flags & pack.REAL))
        self._places += rows.flags.size
        self._steps += 1
        return {"step": finished, "loss": loss, "lr": lr, "grad_norm": norm}

    def pause(self) -> None:
        """What happened since the last step is not training time."""
        self._last = time.perf_counter()

    def row(self, row: dict[str, float]) -> dict[str, float]:
        """The row completed with rates over all workers (each worker's share is taken to be alike); starts anew."""
        layout, seconds = self._layout, max(self._trained, 1e-9)
        row["tokens_per_second"] = self._tokens * layout.world / seconds
        row["step_seconds"] = seconds / max(self._steps, 1)
        row["data_wait_share"] = self._wait / seconds
        row["non_pad_share"] = self._tokens / max(self._places, 1)
        row["memory_gib"] = memory_gib(layout.device)
        if self._peak:
            row["mfu"] = self._flops * self._tokens / seconds / self._peak
        self._reset()
        return row


def memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


class MetricsLog:
    """metrics.jsonl and TensorBoard of one run, in the process that started it.

    A resumed run continues both: rows of steps that will be taken again are dropped, and `known` ones, which came with
    the checkpoint, fill gaps. On object stores, which cannot append, both are kept locally and uploaded by `flush`.
    """

    def __init__(self, run: artifacts.RunDir, start: int, known: Sequence[dict[str, Any]] = ()) -> None:
        self._run = run
        before = read_metrics(run)
        self._rows: list[dict[str, Any]] = _up_to(start, before, known)
        self._remote = paths.is_uri(run.root)
        self._behind = False  # whether the file lacks rows that could not be written
        self._folder = tempfile.mkdtemp(prefix="ray_ft_tb_") if self._remote else run.tensorboard
        self._write()
        self._open(start if start or before else None, before)

    def _open(self, start: int | None, before: Sequence[dict[str, Any]]) -> None:
        """Go on with TensorBoard's curves after step `start`, where the rows so far were those of `before`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=None if start is None else start + 1)
        there = {row["step"] for row in before}
        for row in self._rows:
            if row["step"] not in there:
                self._draw(row)

    def _draw(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def _write(self) -> None:
        paths.write_text(self._run.metrics, "".join(json.dumps(row) + "\n" for row in self._rows))

    def rewind(self, step: int, known: Sequence[dict[str, Any]] = ()) -> None:
        """Drop the rows of steps after `step`, which are taken again, and add `known` ones where there is none."""
        rows = _up_to(step, self._rows, known)
        if rows == self._rows:
            return
        self._writer.close()
        before, self._rows = self._rows, rows
        self._write()
        self._open(step, before)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._draw(row)
        if not self._remote:
            self._behind, behind = True, self._behind
            if behind:  # a full disk took part of a line, or none
                self._write()
            else:
                with open(self._run.metrics, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
            self._behind = False

    def flush(self) -> None:
        self._writer.flush()
        if self._remote or self._behind:
            self._write()
            self._behind = False
        if self._remote:
            paths.upload_dir(self._folder, self._run.tensorboard)

    def close(self) -> None:
        self.flush()
        self._writer.close()


def _up_to(step: int, rows: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of steps up to `step`, in order; a known one where there is none of its step."""
    found = {row["step"]: row for row in (*known, *rows) if row["step"] <= step}
    return [found[at] for at in sorted(found)]


def read_metrics(run: artifacts.RunDir) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl; a last line that was cut off by a crash is left out."""
    if not paths.exists(run.metrics):
        return []
    lines = paths.read_text(run.metrics).split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
