"""The report of a run as its metrics grow."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence

from rich.console import Console

from benchmarks.scale.growth import Series, measured, timed
from ray_ft import recipe, report
from ray_ft.artifacts import RunDir
from ray_ft.train.metrics import MetricsLog, read_metrics
from ray_ft.view import View

STEPS = (100, 1_000, 10_000, 100_000)
STORAGE = "s3://bucket/data?endpoint_override=storage.example"  # a URI, whose credentials the report looks for


def row(step: int) -> dict[str, float]:
    """A row of metrics as training logs it; each tenth has an evaluation."""
    found = {
        "step": step,
        "loss": 4 / math.sqrt(step),
        "lr": 1e-4,
        "grad_norm": 1 / step,
        "tokens_per_second": 12_000.0 + step % 97,
        "step_seconds": 0.5,
        "data_wait_share": 0.004,
        "non_pad_share": 0.98,
        "memory_gib": 0.95,
    }
    return found | ({"eval_loss": 4.1 / math.sqrt(step)} if step % 10 == 0 else {})


def by_steps(scratch: str, repeat: int, sizes: Sequence[int] = STEPS) -> list[Series]:
    root = os.path.join(scratch, "reports")

    def run(size: int) -> dict[str, float]:
        shutil.rmtree(root, ignore_errors=True)
        one = recipe.parse(
            {
                "run": {"name": "run", "storage": root},
                "model": {"path": os.path.join(root, "base")},
                "data": {"train": [{"path": [STORAGE], "format": "text"}]},
                "train": {"max_steps": size},
            }
        )
        one.save()
        folder = RunDir(one.run.dir.root)
        with open(folder.metrics, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row(step)) + "\n" for step in range(1, size + 1))
        view = View(Console(quiet=True))
        seconds = timed(lambda: report.report(folder.root, view))
        page = os.path.getsize(folder.report) / 2**20
        reading = timed(lambda: read_metrics(folder))
        logs: list[MetricsLog] = []
        resuming = timed(lambda: logs.append(MetricsLog(folder, size)))
        adding = timed(lambda: [logs[0].add(row(size + at)) for at in range(1, 101)]) / 100
        logs[0].close()
        return {
            "making the report": seconds,
            "size of the page": page,
            "reading metrics": reading,
            "resuming metrics": resuming,
            "adding a row of metrics": adding,
        }

    found = measured(sizes, run, repeat)
    dues = {"size of the page": 0.0, "adding a row of metrics": 0.0}
    return [
        Series(f"logged steps, {name}", "steps", "MiB" if "size" in name else "s", dues.get(name, 1.0), values)
        for name, values in found.items()
    ]


def series(scratch: str, repeat: int) -> list[Series]:
    return by_steps(scratch, repeat)
