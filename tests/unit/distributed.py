"""Help for tests of training: functions on several gloo processes, tiny runs without Ray, sharded weights as a whole.

Processes are forked from a server that has imported torch and transformers once, so that starting two costs
tenths of a second; each call gets new ones.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ray_ft import recipe as recipes
from ray_ft.data import stream
from ray_ft.demo import PROMPT, DemoPaths
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout, Strategy
from ray_ft.train import worker
from ray_ft.train.asks import Ask

# ------------------------------------------------------------------------------------------------------- processes

_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "ray_ft.train.worker"]
_PRELOADED += ["deepspeed"]  # its import takes seconds
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one
_PRELOADED += ["transformers.models.gemma3.modeling_gemma3", "transformers.models.llama.modeling_llama"]


def run(world: int, function: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
    """Call ``function(rank, world, *args)`` on `world` processes joined by gloo, one thread each.

    Args:
        function: a function of a module, as it is found again by name.
        seconds: after which all processes are ended.

    Returns:
        What each rank returned, by rank. It is pickled, so tensors have to be plain ones.

    Raises:
        AssertionError: a rank failed, with its traceback, or they took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ends, processes = [], []
    with tempfile.TemporaryDirectory(prefix="ray_ft_gloo_") as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(theirs, os.path.join(folder, "store"), rank, world, function, args)
                )
                process.start()
                theirs.close()
                ends.append(ours)
                processes.append(process)
            return _collect(ends, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(ends: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = {end: rank for rank, end in enumerate(ends) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} did not return in time")
        for end in ready:
            rank = waiting[end]
            try:
                fault, content = end.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without an answer") from None
            if fault:
                raise AssertionError(f"rank {rank} failed:\n{fault}")
            results[rank] = pickle.loads(content)
    return [results[rank] for rank in range(len(ends))]


def _child(answer: Any, store: str, rank: int, world: int, function: Callable[..., Any], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve would stop gloo
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        result = function(rank, world, *args)
        answer.send((None, pickle.dumps(result)))
        if world > 1:
            torch.distributed.barrier()  # nobody leaves while another still talks to it
    except BaseException:
        answer.send((traceback.format_exc(), None))
    finally:
        sys.stdout.flush()
        os._exit(0)  # destroying a gloo group after a failure can wait for ever


# ---------------------------------------------------------------------------------------------------------- recipes


def recipe_of(demo: DemoPaths, storage: str | Path, *overrides: str) -> Recipe:
    """A recipe for seconds of training on the demo, without Ray; `overrides` as on the command line."""
    rows = {"format": "translation", "prompt": PROMPT}
    content: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "model": {"path": demo.base},
        "data": {
            "train": [{"path": list(demo.train), **rows}],
            "eval": [{"path": demo.heldout, **rows}],
            "seq_len": 96,
        },
        "train": {
            "strategy": "none",
            "workers": 0,
            "device": "cpu",
            "global_batch": 8,
            "micro_batch": 4,
            "optimizer": {"lr": 3e-3},
            "log_every": 1,
        },
    }
    for override in overrides:
        recipes.apply_override(content, override)
    return recipes.parse(content)


def pictured_recipe(
    pictures: DemoPaths, storage: Path, sources: list[dict[str, Any]] | None = None, *more: str
) -> Recipe:
    """A recipe for seconds of training on pictures, without Ray; `sources` replaces data.train."""
    messages, parquet = list(pictures.train[:2]), pictures.train[2]
    given = [{"path": parquet, "format": "image_question"}, {"path": messages, "format": "messages"}]
    content: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "model": {"path": pictures.base},
        "data": {"train": sources or given, "images": {}, "seq_len": 128},
        "train": {
            "strategy": "none", "workers": 0, "device": "cpu", "global_batch": 4, "micro_batch": 2, "log_every": 1,
            "optimizer": {"lr": 1e-3},
        },
    }  # fmt: skip
    for override in more:
        recipes.apply_override(content, override)
    return recipes.parse(content)


# --------------------------------------------------------------------------------------------------------- training


def build(recipe: Recipe, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float32) -> Strategy:
    """The recipe's model under its strategy, filled from its base, in training mode: what `worker.run` builds."""
    return worker.build(recipe, Layout(rank, world, torch.device("cpu"), dtype)).strategy


def weights(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Whole parameters by the names that they have in the Hugging Face model, put together from all ranks' runs."""
    found = {}
    for name, span in strategy.spans().items():
        whole = torch.zeros(span.numel, dtype=span.data.dtype)
        if span.owner:
            whole[span.start : span.stop] = span.data
        found[name] = strategy.all_reduce(whole).view(span.shape)
    return found


@dataclass
class FakeLink:
    """Collects rows of metrics; asks for the end with the step `stop_after` steps from the start."""

    stop_after: int | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    began: list[tuple[int, int]] = field(default_factory=list)
    questions: int = 0

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        self.began.append((step, workers))

    def say(self, line: str) -> None:
        self.lines.append(line)

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def asked(self) -> Ask:
        self.questions += 1
        return Ask.STOP if self.questions == self.stop_after else Ask.NOTHING

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]


def run_job(
    rank: int, world: int, job: worker.Job, stop_after: int | None = None
) -> tuple[int, list[dict[str, float]]]:
    """`worker.run` on this rank, its rows read without Ray. Returns (steps finished, rows of metrics)."""
    link = FakeLink(stop_after)
    rows, share = job.recipe.train.global_batch, job.recipe.train.rows_per_worker

    def batches(order: Any, start: int, total: int) -> Any:
        return stream.local_batches(order, start * rows, total * rows, rank, world, share)

    finished = worker.run(job, job.start(), Layout(rank, world, torch.device("cpu"), torch.float32), batches, link)
    return finished, link.rows


def run_jobs(
    rank: int, world: int, jobs: Sequence[tuple[worker.Job, int | None]]
) -> list[tuple[int, list[dict[str, float]]]]:
    """`run_job` for several (job, stop_after), one after the other."""
    return [run_job(rank, world, job, stop_after) for job, stop_after in jobs]


class KeepNothing:
    """Stands in for `keeper.Keeper` where a test wants no checkpoints."""

    def signals(self) -> tuple[float, ...]:
        return ()

    def advance(self, sums: list[float]) -> None:
        assert sums == []

    def used(self, step: int, batch: Any) -> None:
        pass

    def noted(self, row: dict[str, float]) -> None:
        pass

    def save(self, step: int, wait: bool) -> bool:
        return True

    def check(self, step: int, needed: bool) -> None:
        pass
