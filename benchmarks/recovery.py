"""A worker is killed: seconds until training has taken another step, by `ray-ft train` and by torchrun's restarts.

    python -m benchmarks.recovery [--pairs 8] [--to FILE]

Two workers train the demo with a checkpoint every few steps; in the middle between two, one of them gets SIGKILL. Ours
goes on by itself at the newest checkpoint; `torchrun --max-restarts` starts all workers of the same loop again, which
begin at their newest (peers/torchrun_loop.py). Compared is the time from the kill until a step was finished by the
new workers, with the start of the same run (from the command to its first finished step) and with torchrun's; and how
many steps each takes again. What the time consists of is read off what the run prints and when its processes appear.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.pairs import PAIRS, interleaved, ratios
from benchmarks.peers.torchrun_restarts import Torchrun
from benchmarks.result import Figure, Table, options, recorded

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.multihost

from ray_ft import demo, recipe
from ray_ft.data import pack, stream
from ray_ft.train.launch import prepare_job
from ray_ft.view import View
from tests.multihost.training import POLL, Local, Training

WORKERS = 2
GLOBAL_BATCH, MICRO_BATCH, SEQ_LEN, LR = 16, 8, 256, 4e-3
EVERY = 10  # steps between checkpoints
KILL_AT = 25  # finished steps
STEPS = 200  # none gets there
PATIENCE = 240  # seconds
NOTICED = re.compile(r"starting again at the newest checkpoint")
GOES_ON = re.compile(r"training goes on at step \d+ of")
AIM = 1.0


def settings_of(made: demo.DemoPaths, folder: Path) -> dict[str, Any]:
    """The recipe that both train by."""
    return {
        "run": {"name": "recovery", "storage": str(folder / "runs")},
        "model": {"path": made.base},
        "data": {
            "train": [{"path": list(made.train), "format": "translation", "prompt": demo.PROMPT}],
            "seq_len": SEQ_LEN,
        },
        "train": {
            "workers": WORKERS,
            "global_batch": GLOBAL_BATCH,
            "micro_batch": MICRO_BATCH,
            "max_steps": STEPS,
            "optimizer": {"lr": LR},
            "schedule": {"name": "constant"},
            "log_every": 1,
            "checkpoint": {"every": EVERY},
        },
    }


def write_rows(settings: recipe.Recipe, file: Path) -> None:
    """The rows in the order of the run, for the peer; data are prepared by that, for both."""
    job = prepare_job(settings, View(Console(quiet=True)), stream.in_process)
    count = STEPS * GLOBAL_BATCH
    batches = list(stream.local_batches(job.order, 0, count, 0, 1, GLOBAL_BATCH))
    ids = np.concatenate([batch.rows.input_ids for batch in batches]).astype(np.int64)
    flags = np.concatenate([batch.rows.flags for batch in batches])
    np.savez(file, input_ids=ids, position_ids=pack.position_ids(flags), labels=pack.labels(ids, flags))


# ------------------------------------------------------------------------------------------------------ what is done


class Watch:
    """Notes when things happen after a kill, by the monotonic clock, in a thread until it is told to end.

    Attributes:
        seen: "noticed", "started" (the first new worker is named), "begins" (training goes on) → when.
    """

    def __init__(self, run: Training) -> None:
        self._run, self._before, self._old = run, set(run.workers()), run.output()
        self.seen: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        looks: dict[str, Callable[[], Any]] = {
            "noticed": lambda: NOTICED.search(self._run.output(), len(self._old)),
            "started": lambda: set(self._run.workers()) - self._before,
            "begins": lambda: GOES_ON.search(self._run.output(), len(self._old)),
        }
        while looks and not self._over.wait(POLL):
            for what in [what for what, look in looks.items() if look()]:
                self.seen[what] = time.monotonic()
                del looks[what]

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def ours(folder: Path, number: int) -> dict[str, float]:
    """Seconds of the start and of the recovery with its parts, and the steps that are taken again."""
    run = Training(Local(), folder / "recipe.json", folder / "runs", f"pair-{number}")
    began = time.monotonic()
    run.begin()
    try:
        run.wait_step(1, PATIENCE)
        cold = time.monotonic() - began
        run.wait_step(KILL_AT, PATIENCE)
        watch = Watch(run)
        victim = sorted(run.workers())[number % WORKERS]
        struck = time.monotonic()
        try:
            recovery = run.strike("worker killed", lambda: os.kill(victim, signal.SIGKILL), PATIENCE)
        finally:
            watch.end()
    finally:
        run.signal(signal.SIGTERM)
        run.end(PATIENCE)
    assert recovery.model_seconds is not None, "the run said that it goes on, but not how long its model took"
    at = {what: seconds - struck for what, seconds in watch.seen.items()}
    found = {"cold": cold, "recovery": recovery.seconds, "again": recovery.lost}
    return found | parts(at, recovery.model_seconds, recovery.seconds)


def parts(at: Mapping[str, float], model: float, recovery: float) -> dict[str, float]:
    """What a recovery consists of, in seconds that add up to it.

    Args:
        at: what `Watch` saw, in seconds after the kill.
        model: seconds for building and restoring the model, which end where training begins.
    """
    ends = (at["noticed"], at["started"], at["begins"] - model, at["begins"], recovery)
    return {part: end - begin for part, begin, end in zip(PARTS, (0.0, *ends), ends, strict=False)}


def torchrun(folder: Path, number: int) -> dict[str, float]:
    """The same of torchrun, without the parts."""
    own = folder / f"torchrun-{number}"
    own.mkdir()
    progress, settings = own / "progress", own / "settings.json"
    content = {
        "rows": str(folder / "rows.npz"),
        "model": str(folder / "demo" / "base"),
        "threads": 1,
        "global_batch": GLOBAL_BATCH,
        "steps": STEPS,
        "lr": LR,
        "checkpoint": {"folder": str(own / "checkpoints"), "every": EVERY},
        "progress": str(progress),
        "result": str(own / "result.json"),
    }
    settings.write_text(json.dumps(content))
    run = Torchrun(settings, progress, WORKERS)
    try:
        cold = run.wait("first step", lambda: bool(run.steps()), PATIENCE) - run.began
        run.wait(f"step {KILL_AT}", lambda: max(run.steps()) >= KILL_AT, PATIENCE)
        struck = time.monotonic()
        os.kill(run.workers()[number % WORKERS], signal.SIGKILL)
        went_on = run.wait("step after the kill", lambda: resumed(run.steps()) is not None, PATIENCE)
        steps = run.steps()
    finally:
        run.end()
    begins = resumed(steps)
    assert begins is not None
    return {"cold": cold, "recovery": went_on - struck, "again": steps[begins - 1] - steps[begins] + 1}


def resumed(steps: Sequence[int]) -> int | None:
    """Where in a list of finished steps a run has gone back, or None."""
    return next((at for at in range(1, len(steps)) if steps[at] <= steps[at - 1]), None)


# ----------------------------------------------------------------------------------------------------------- results

#: Each ends where the next one begins.
PARTS = (
    "the death is noticed",
    "new workers are placed and their processes started",
    "they import, find each other, and wait for the first rows",
    "the model is built and restored",
    "the first step",
)


def figures(pairs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    def of(arm: str, key: str) -> list[float]:
        return [pair[arm][key] for pair in pairs]

    own = [pair["ray-ft"]["recovery"] / pair["ray-ft"]["cold"] for pair in pairs]
    theirs = [pair["torchrun"]["recovery"] / pair["torchrun"]["cold"] for pair in pairs]
    return [
        Figure("kill to the next finished step ÷ start of the same run, ray-ft", own, at_most=AIM),
        Figure("the same of torchrun", theirs),
        Figure("kill to the next finished step, ray-ft ÷ torchrun", ratios(pairs, "ray-ft", "torchrun", "recovery")),
        Figure("kill to the next finished step, ray-ft", of("ray-ft", "recovery"), unit="s", form="{:.1f}"),
        Figure("kill to the next finished step, torchrun", of("torchrun", "recovery"), unit="s", form="{:.1f}"),
        Figure("command to the first finished step, ray-ft", of("ray-ft", "cold"), unit="s", form="{:.1f}"),
        Figure("command to the first finished step, torchrun", of("torchrun", "cold"), unit="s", form="{:.1f}"),
        Figure("steps taken again, ray-ft", of("ray-ft", "again"), form="{:.0f}"),
        Figure("steps taken again, torchrun", of("torchrun", "again"), form="{:.0f}"),
    ]


def where(pairs: Sequence[Mapping[str, Any]]) -> Table:
    values = {part: [pair["ray-ft"][part] for pair in pairs] for part in PARTS}
    rows = [
        [part, *(f"{value:.1f}" for value in (statistics.median(seconds), min(seconds), max(seconds)))]
        for part, seconds in values.items()
    ]
    return Table("Where ray-ft's recovery goes, in seconds", ["until", "median", "least", "most"], rows)


def show(pair: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{arm}: start {one['cold']:.1f} s, recovery {one['recovery']:.1f} s, {one['again']:.0f} steps again"
        for arm, one in pair.items()
    )


def main() -> None:
    given = options(__doc__, PAIRS).parse_args()
    conditions = {
        "data": f"the demo's rows, {GLOBAL_BATCH} × {SEQ_LEN} tokens a step, prepared before; ray-ft streams them, "
        "torchrun's loop has them in memory",
        "model": "the demo's Gemma 3 of 1.1M parameters",
        "threads": f"1 in each of {WORKERS} workers",
        "flops": "none",
        "clipping": "at 1.0",
        "padding": "none: packed rows",
        "checkpoints": f"each {EVERY} steps; of torchrun's loop by torch.distributed.checkpoint.save",
        "the kill": f"SIGKILL to one of the workers, in turn, once {KILL_AT} steps are finished",
        "seen": f"by looking each {POLL} s; ray-ft's rows of metrics take up to 0.25 s more to arrive",
    }
    compared = (
        "A worker is killed, and training goes on by itself: `ray-ft train` against `torchrun --max-restarts`, which "
        "starts the same loop again from an ordinary checkpoint."
    )
    with (
        recorded("recovery", compared, conditions, given) as result,
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
    ):
        folder = Path(scratch)
        content = settings_of(demo.write_demo(str(folder / "demo")), folder)
        (folder / "recipe.json").write_text(json.dumps(content))
        write_rows(recipe.parse(content), folder / "rows.npz")
        arms = {"ray-ft": partial(ours, folder), "torchrun": partial(torchrun, folder)}
        pairs = interleaved(arms, given.pairs, show=show)
        result.figures += figures(pairs)
        result.tables.append(where(pairs))
        result.raw = pairs


if __name__ == "__main__":
    main()
