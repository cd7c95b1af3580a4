"""Checkpoints: how long training waits for one, how much slower steps are while one is written, how soon it is back.

    python -m benchmarks.checkpoint [--pairs 8] [--mib 512] [--to FILE]

In one process, the product's own training: `worker.build`, `train_step`, and the keeper as the loop calls it, on a
Gemma 3 whose trained weights and two AdamW moments are as large as asked. Beside it PyTorch's ways with the same
tensors (peers/torch_checkpoints.py), and a copy of as many bytes in memory, which no safe way can undercut: what a
thread writes while training goes on has to be a copy.

What is written lies on the file system of the temporary folder. Between measurements everything is flushed to disk, so
that none pays for what another left behind; what is read was written a moment ago, and is still in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pairs import PAIRS, interleaved, ratios
from benchmarks.peers import torch_checkpoints as peers
from benchmarks.result import Figure, Table, options, recorded
from ray_ft import demo, recipe
from ray_ft.data import pack
from ray_ft.data.render import Tokens
from ray_ft.data.stream import Batch
from ray_ft.paths import RunDir
from ray_ft.strategy import Layout
from ray_ft.train import checkpoint, worker
from ray_ft.train.keeper import Keeper
from ray_ft.train.loop import train_step
from ray_ft.train.saver import Saver

MIB = 512
SIZES = (64, 256, 1024)  # MiB, of the table
ROWS, SEQ_LEN = 4, 32  # of a step: as small as it can be while the update of the weights does not outweigh the rest
STEPS = 12  # in a stretch of steps, while checkpoints are written or while none is
REPEATS = 3  # of what the table shows
THREADS = 1  # of the training; the second core is the writer's
BLOCKED_AIM, SLOWER_AIM = 1.2, 1.03


class Training:
    """A run of the product in this process, without Ray: what its loop does between two steps, and nothing else."""

    def __init__(self, folder: str, mib: float) -> None:
        made = demo.write_demo(os.path.join(folder, "demo"), rows=300, **shape(mib))
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
        self.folder = RunDir(self._recipe.run.dir.root).checkpoints
        saver = Saver(self.folder, 1, 0, 1, {}, True, lambda line: sys.exit(f"a save failed: {line}"), folder)
        self._keeper = Keeper(saver, self.spans, partial(worker.sum_over_workers, self._strategy), resting=True)
        rng = np.random.default_rng(0)
        samples = [Tokens(rng.integers(6, 500, SEQ_LEN).astype(np.int32), np.ones(SEQ_LEN, bool)) for _ in range(ROWS)]
        self._batch = Batch(0, pack.pack(samples, SEQ_LEN, packing=False, pad_id=0)[0])
        self._finished = 0
        self.waited = 0.0  # seconds of the last step, before its update, for the copy of a save
        self.step()  # before it, the optimizer has no moments

    def spans(self) -> dict[str, Any]:
        return worker.state(self._strategy)

    def tensors(self) -> peers.State:
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

    def save(self) -> float:
        """Begin a checkpoint as the loop does. Returns the seconds that this takes."""
        began = time.perf_counter()
        self._keeper.save(self._finished, wait=False)
        return time.perf_counter() - began

    @property
    def pending(self) -> bool:
        return self._keeper.saver.pending is not None

    @property
    def writing(self) -> bool:
        """Whether the thread has not yet written its part."""
        return self.pending and not self._keeper.signals()[0]

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

    def stretch(self, saving: bool) -> tuple[list[tuple[float, str]], float, int]:
        """`STEPS` steps; `saving`: a save begins after the first and whenever the one before it is committed.

        Returns:
            (seconds, kind) of each step: "quiet", "written" while a save was copied and written all along, or "other";
            the seconds of all that, and the saves in it.
        """
        steps: list[tuple[float, str]] = []
        began, saves = time.perf_counter(), 0
        for number in range(STEPS):
            before, pending = self.writing, self.pending
            seconds = self.step()
            kind = "quiet" if not pending else "written" if before and self.writing else "other"
            steps.append((seconds, kind))
            if saving and not self.pending and number < STEPS - 1:
                self.save()
                saves += 1
        seconds = time.perf_counter() - began
        self.settle()
        return steps, seconds, saves

    def close(self) -> None:
        self.settle()
        self._keeper.saver.close()


def shape(mib: float) -> dict[str, int]:
    """Width and layers of a demo's base whose weights and two moments, float32 each, take about `mib` MiB."""
    width = 256 if mib < 128 else 512 if mib <= 512 else 1024
    each = 3 * 4 * width**2 + 384 * width  # of a layer: its MLP, and its attention of 4 heads of 32
    return {"hidden_size": width, "layers": max(round((mib * 2**20 / 12 - 700 * width) / each), 1)}


# ------------------------------------------------------------------------------------------------------ measurements


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Copy:
    """As many bytes as the state has, in one piece, from memory to memory that is there already.

    By numpy: on the machine that this was written on, its copy of 256 MiB took half as long as torch's.
    """

    def __init__(self, size: int) -> None:
        self._source, self._target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def __call__(self) -> dict[str, float]:
        return {"blocked": timed(lambda: np.copyto(self._target, self._source))}


def ours(training: Training) -> dict[str, float]:
    """Seconds blocked by a save, between two steps and within the one after it; those to restore it; bytes on disk."""
    training.step()
    begun = training.save()
    training.step()
    blocked = begun + training.waited
    training.settle()
    size = size_of(training.folder)
    return {"blocked": blocked, "restore": training.restore(), "bytes": size}


def peer(
    save: Callable[[peers.State, str], Any],
    loads: Mapping[str, Callable[[peers.State, str], None]],
    training: Training,
    folder: str,
) -> dict[str, float]:
    """The same of a peer; `loads` by the names that their seconds get."""
    training.step()
    tensors, target = training.tensors(), os.path.join(folder, "peer")
    try:
        began = time.perf_counter()
        wait = save(tensors, target)
        found = {"blocked": time.perf_counter() - began}
        if wait is not None and callable(wait):
            wait()
        found["bytes"] = size_of(target)
        found |= {name: timed(partial(load, tensors, target)) for name, load in loads.items()}
        return found
    finally:
        shutil.rmtree(target, ignore_errors=True)


def size_of(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def settled(arm: Callable[[], Any], _: int) -> Any:
    """What an arm gives, with nothing of the others waiting to be written to disk."""
    os.sync()
    return arm()


def arms(training: Training, folder: str, asynchronous: peers.Async) -> dict[str, Callable[[int], Any]]:
    """What is compared, by name."""
    loads = {"restore": peers.torch_load, "mapped": peers.torch_load_mapped}
    found = {
        "copy": Copy(training.bytes),
        "ray-ft": partial(ours, training),
        "torch": partial(peer, peers.torch_save, loads, training, folder),
        "dcp": partial(peer, peers.dcp_save, {"restore": peers.dcp_load}, training, folder),
        "async": partial(peer, asynchronous.save, {}, training, folder),
    }
    return {name: partial(settled, arm) for name, arm in found.items()}


def overlap(training: Training, threads: int, number: int) -> dict[str, float]:
    """Median seconds of a step while none is saved and while a save is written all along, and what a save costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        os.sync()
        stretches = {saving: training.stretch(saving) for saving in ((False, True) if number % 2 else (True, False))}
    finally:
        torch.set_num_threads(before)
    found = medians([*stretches[False][0], *stretches[True][0]])
    _, seconds, saves = stretches[True]
    return found | {"cost": (seconds - STEPS * found["quiet"]) / saves}


def medians(steps: Sequence[tuple[float, str]]) -> dict[str, float]:
    """By kind: how long a step takes; and how many were taken beside a save.

    Raises:
        RuntimeError: no step had a save written all along, so that there is nothing to compare.
    """
    by_kind = {kind: [seconds for seconds, its in steps if its == kind] for kind in ("quiet", "written")}
    if not by_kind["written"]:
        raise RuntimeError("each save was written within one step: take a larger --mib")
    return {kind: statistics.median(seconds) for kind, seconds in by_kind.items()} | {"steps": len(by_kind["written"])}


@contextlib.contextmanager
def training_of(mib: float) -> Iterator[tuple[Training, str]]:
    with tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as folder:
        training = Training(folder, mib)
        try:
            yield training, folder
        finally:
            training.close()


# ----------------------------------------------------------------------------------------------------------- results


def measure(mib: float, pairs: int) -> dict[str, Any]:
    """Everything about a state of that size; the table's come without steps, by `pairs` alone."""
    with training_of(mib) as (training, folder), contextlib.closing(peers.Async()) as asynchronous:
        first = training.save()
        training.settle()
        found = interleaved(arms(training, folder, asynchronous), pairs, show=show)
        return {"bytes": training.bytes, "first": first, "pairs": found}


def slowed(mib: float, pairs: int) -> dict[int, list[dict[str, float]]]:
    """Of steps: `overlap` of each pair, by the threads of the training."""
    with training_of(mib) as (training, _):
        training.save()
        training.settle()
        stretches = {f"{threads}": partial(overlap, training, threads) for threads in (1, 2)}
        found = interleaved(stretches, pairs, show=show_steps)
    return {threads: [pair[f"{threads}"] for pair in found] for threads in (1, 2)}


def show(pair: Mapping[str, Any]) -> str:
    blocked = ", ".join(f"{name} {one['blocked']:.3f}" for name, one in pair.items())
    restored = ", ".join(f"{name} {one['restore']:.3f}" for name, one in pair.items() if "restore" in one)
    return f"blocked: {blocked} s; restored: {restored} s"


def show_steps(pair: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{threads} threads: step {one['quiet']:.3f} s, {one['written']:.3f} s in {one['steps']} beside a save"
        for threads, one in pair.items()
    )


def figures(found: Mapping[str, Any], steps: Mapping[int, Sequence[Mapping[str, float]]]) -> list[Figure]:
    pairs, gib = found["pairs"], found["bytes"] / 2**30

    def against(what: str, name: str, key: str, **aim: float) -> Figure:
        return Figure(f"{what}, ray-ft ÷ {name}", ratios(pairs, "ray-ft", NAMES[name], key), **aim)

    def slower(threads: int, **aim: float) -> Figure:
        of = f"{threads} thread{'s' * (threads > 1)} on {os.cpu_count()} cores"
        ratio = [one["written"] / one["quiet"] for one in steps[threads]]
        return Figure(f"a step while a save is written ÷ a step without, {of}", ratio, **aim)

    return [
        against("seconds blocked by a save", "a copy in memory", "blocked", at_most=BLOCKED_AIM),
        slower(1, at_most=SLOWER_AIM),
        slower(2),
        *(against("blocked", name, "blocked") for name in ("torch.save", "DCP save", "DCP async_save")),
        *(against("restore", name, "restore") for name in ("torch.load", "DCP load")),
        Figure("restore, ray-ft ÷ torch.load(mmap=True)", restored_mapped(pairs)),
        *(against("bytes on disk", name, "bytes") for name in ("torch.save", "DCP save")),
        Figure(
            "what a save costs in all, waiting and slower steps, 1 thread", [one["cost"] for one in steps[1]], unit="s"
        ),
        Figure("blocked by a save", [pair["ray-ft"]["blocked"] for pair in pairs], unit="s"),
        Figure("blocked by the first save, which also allocates the copy", [found["first"]], unit="s"),
        Figure("a copy in memory", [gib / pair["copy"]["blocked"] for pair in pairs], unit="GiB/s", form="{:.1f}"),
    ]


def restored_mapped(pairs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [pair["ray-ft"]["restore"] / pair["torch"]["mapped"] for pair in pairs]


#: What is said → the arm.
NAMES = {
    "a copy in memory": "copy",
    "torch.save": "torch",
    "torch.load": "torch",
    "DCP save": "dcp",
    "DCP load": "dcp",
    "DCP async_save": "async",
}


def growth(found: Sequence[Mapping[str, Any]]) -> Table:
    """Medians by size."""

    def cell(one: Mapping[str, Any], arm: str, key: str) -> str:
        return f"{statistics.median(pair[arm][key] for pair in one['pairs']):.3f}"

    columns = {"copy in memory": ("copy", "blocked")}
    columns |= {f"blocked: {arm}": (arm, "blocked") for arm in ("ray-ft", "async", "torch", "dcp")}
    columns |= {f"restore: {arm}": (arm, "restore") for arm in ("ray-ft", "torch", "dcp")}
    rows = [
        [
            f"{one['bytes'] / 2**20:,.0f}",
            f"{one['first']:.3f}",
            *(cell(one, *column) for column in columns.values()),
        ]
        for one in found
    ]
    title = "Seconds by the size of the state (medians; async and dcp are torch.distributed.checkpoint's)"
    return Table(title, ["MiB", "blocked, first", *columns], rows)


def main() -> None:
    parser = options(__doc__, PAIRS)
    parser.add_argument("--mib", type=float, default=MIB, help=f"size of the state; default: {MIB}")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    conditions = {
        "data": f"random tokens, {ROWS} rows of {SEQ_LEN} a step; a Gemma 3 with about {given.mib:g} MiB of float32 "
        "weights and AdamW moments, under FSDP with one worker",
        "threads": "1, beside the writer's; 2 where said",
        "flops": "none",
        "clipping": "at 1.0, in every step",
        "padding": "none",
        "copy": "one numpy copy of as many bytes, in one piece, into memory that is there, in each pair",
        "disk": f"a folder in {tempfile.gettempdir()}, flushed between measurements; ours also waits in its thread "
        "until the disk has the file, the peers do not; what is read is in memory",
        "processes": "one, without Ray",
    }
    compared = (
        "Saving and restoring the same weights and AdamW moments: ray-ft's saver as its training loop calls it, "
        "torch.save, and torch.distributed.checkpoint (DCP), at once and asynchronously."
    )
    with recorded("checkpoint", compared, conditions, given) as result, peers.alone():
        found = measure(given.mib, given.pairs)
        steps = slowed(given.mib, given.pairs)
        result.figures += figures(found, steps)
        sizes = [measure(mib, min(REPEATS, given.pairs)) for mib in SIZES]
        result.tables.append(growth(sizes))
        result.raw = {"main": found, "steps": steps, "sizes": sizes}


if __name__ == "__main__":
    main()
