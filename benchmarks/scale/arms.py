"""One run of the tiny model in each of three ways, whose steps differ in what surrounds them:

    whole       Ray Data deals the rows, Ray Train's controller watches the workers
    control     the controller alone: no dataset is built and nothing deals it, as each worker reads its rows into
                memory before the first step
    plain       the same loop in processes that this one starts, rows in memory, no Ray

In the first two the rows of metrics also say how long the first worker talked to the board.

`python -m benchmarks.scale.arms REQUEST.json` is one process of `plain`; `with_ray` runs the other two.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from ray_ft import recipe
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.train import cluster, launch, worker
from ray_ft.train.asks import Ask
from ray_ft.train.board import BoardLink, Message
from ray_ft.train.schedule import total_steps
from ray_ft.view import View

WAYS = ("whole", "control", "plain")
STEPS = 24
LOG_EVERY = 2
GLOBAL_BATCH = 8
SEQ_LEN = 64
TALK = "talk_seconds"  # in a row of metrics: of a step, spent on the board


def job(scratch: str, base: str, rows: str, workers: int, name: str, steps: int = STEPS) -> worker.Job:
    """The run of `name`, whose data is prepared."""
    source = {"path": [rows], "format": "text"}
    one = recipe.parse(
        {
            "run": {"name": name, "storage": os.path.join(scratch, "runs")},
            "model": {"path": base},
            "data": {"train": [source], "seq_len": SEQ_LEN},
            "train": {
                "workers": workers,
                "cpus_per_worker": 0.25,  # 8 workers and what reads rows, on two cores
                "device": "cpu",
                "global_batch": GLOBAL_BATCH,
                "micro_batch": 1,
                "max_steps": steps,
                "log_every": LOG_EVERY,
                "checkpoint": {"every": steps},
            },
        }
    )
    from rich.console import Console

    return launch.prepare_job(one, View(Console(quiet=True)), stream.in_process)


def in_memory(job: worker.Job, order: Order, start: int, rank: int, world: int, rows: int) -> list[stream.Batch]:
    """All batches of one worker from position `start` on."""
    stop = total_steps(job.recipe, order) * job.recipe.train.global_batch
    return list(stream.local_batches(order, start, stop, rank, world, rows))


class Rows:
    """Hears the rows of metrics. `first`: seconds from `began` to the first of them."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.first: float | None = None
        self.rows: list[dict[str, float]] = []

    def take(self, messages: list[Message]) -> None:
        for kind, content in messages:
            if kind == "row":
                self.log(content)

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        """Nothing is kept of it."""

    def say(self, line: str) -> None:
        """As `begin`."""

    def log(self, row: dict[str, float]) -> None:
        self.first = self.first or time.monotonic() - self.began
        self.rows.append(row)

    def asked(self) -> Ask:
        return Ask.NOTHING

    def can_cancel(self, cancel: Callable[[], None]) -> None:
        """Nobody cancels."""

    def found(self) -> dict[str, Any]:
        return {"first": self.first, "rows": self.rows}


def with_ray(job: worker.Job, way: str) -> dict[str, Any]:
    """`whole` or `control` on the connected Ray: seconds to the first row of metrics, and all rows."""
    heard = Rows()
    with contextlib.ExitStack() as patched:
        on_each = _whole_worker
        if way == "control":
            from ray_ft.train import controller

            on_each = _control_worker
            patched.enter_context(mock.patch.object(controller, "Dealer", without_rows(controller.Dealer)))
            patched.enter_context(mock.patch.object(stream, "training_dataset", return_value=None))
        patched.enter_context(mock.patch.object(cluster, "_ray_worker", on_each))
        cluster.run(job, heard)
    return heard.found()


def without_rows(dealer: type[Any]) -> type[Any]:
    """A dealer that says where the run stands, as the product's, and has no rows: no dataset, no coordinator."""
    from ray_ft.train.controller import Part

    class NoRows(dealer):  # type: ignore[misc]
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            found, _ = self._start()
            self._parts = [Part(found, None)] * worker_group_context.num_workers  # type: ignore[arg-type]

        def stop(self) -> None:
            self._parts = []

    return NoRows


class Timed(BoardLink):
    """The product's link, which writes into each row of metrics how long a step's calls of it took: `TALK`."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._talked, self._steps = 0.0, 0

    def log(self, row: dict[str, float]) -> None:
        each = self._talked / max(self._steps, 1)
        began = time.perf_counter()
        super().log({**row, TALK: each})
        self._talked, self._steps = time.perf_counter() - began, 0  # what sending a row takes is in the next one

    def asked(self) -> Ask:
        began = time.perf_counter()
        found = super().asked()
        self._talked += time.perf_counter() - began
        self._steps += 1  # it is asked once a step
        return found


_real_worker = cluster._ray_worker


def _whole_worker(config: dict[str, Any]) -> None:
    with mock.patch.object(cluster, "BoardLink", Timed):
        _real_worker(config)


def _control_worker(config: dict[str, Any]) -> None:
    def batches(shard: Any, order: Order, start: int, rank: int, world: int, rows: int) -> list[stream.Batch]:
        return in_memory(config["job"], order, start, rank, world, rows)

    with mock.patch.object(stream, "batches", batches):
        _whole_worker(config)


def plain(job: worker.Job, scratch: str) -> dict[str, Any]:
    """The same without Ray: processes that find each other by a file."""
    world = job.recipe.train.world_size
    folder = Path(scratch, f"plain-{time.time_ns()}")
    folder.mkdir()
    (folder / "job").write_bytes(pickle.dumps(job))
    began = time.monotonic()
    processes = []
    for rank in range(world):
        request = folder / f"{rank}.json"
        request.write_text(json.dumps({"folder": str(folder), "rank": rank, "world": world, "began": began}))
        command = [sys.executable, "-m", "benchmarks.scale.arms", str(request)]
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"processes of the plain loop ended with {codes}")
    return json.loads((folder / "found.json").read_text())


def _one(request: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    from ray_ft.strategy import Layout

    folder, rank, world = Path(request["folder"]), request["rank"], request["world"]
    own: worker.Job = pickle.loads((folder / "job").read_bytes())
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    heard = Rows()
    heard.began = request["began"]  # the clock is the machine's

    def batches(order: Order, start: int, total: int) -> list[stream.Batch]:
        size = own.recipe.train.global_batch
        return in_memory(own, order, start * size, rank, world, size // world)

    worker.run(own, None, Layout(rank, world, torch.device("cpu"), torch.float32), batches, heard)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(heard.found()))
    dist.destroy_process_group()


if __name__ == "__main__":
    from benchmarks.scale import arms  # so that what is pickled has one name

    arms._one(json.loads(Path(sys.argv[1]).read_text()))
