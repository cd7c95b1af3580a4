"""A run that is killed at random against one that nobody disturbs: a table of promises kept.

    python -m benchmarks.chaos --seed 1 [--kills 5] [--mode fsdp|elastic|zero3] [--hosts 2] [--local]

Trains the demo twice, with a worker on each of several hosts (tests/multihost/testbed.py): once in peace, once with
faults. The seed draws the kind of each fault, its victim and its step: a worker is killed (SIGKILL) or hangs (SIGSTOP),
a host loses its power or is cut off the network; a host comes back after training went on without it (elastic), or as
soon as Ray has given it up (fsdp, zero3, which wait for it). Without root there are no hosts: then workers of a private
Ray on this machine are killed or hang.

Compared are the samples used, the loss of each step and the last checkpoint: equal to the bit under fsdp with a fixed
number of workers, within 1e-5 relative where the number changes (elastic) and under zero3. Printed as well: seconds
from each fault to the next finished step, of which for loading the model; steps taken again; seconds that training was
blocked for each checkpoint. Exits with 1 if a promise is broken. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_ft import recipe as recipes
from ray_ft.artifacts import RunDir
from ray_ft.data import stream
from ray_ft.demo import PROMPT, write_demo
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.train.metrics import read_metrics
from ray_ft.train.schedule import total_steps
from ray_ft.view import View
from tests.multihost.judge import Verdict, judge
from tests.multihost.testbed import Bed, why_not
from tests.multihost.training import Local, OnBed, Place, Recovery, Training

LIMITS = {"fsdp": 0.0, "elastic": 1e-5, "zero3": 1e-5}  # of relative differences; 0: equal bits
EPOCHS = {"fsdp": 8, "zero3": 8, "elastic": 16}  # elastic: hosts need time to come back
EVERY = 10  # steps between checkpoints
HANG = 10  # seconds
LOST = 15  # seconds in which training has to go on after a SIGKILL, beside those for loading the model
HOST_FAULTS = ("host loses power", "host cut off")
WORKER_FAULTS = ("worker killed", "worker killed", "worker hangs")
PATIENCE = 300  # seconds until a run that does not go on is given up


@dataclass(frozen=True)
class Fault:
    """What is done at a step. `victim` draws the worker or the host, among as many as there are then."""

    kind: str
    step: int
    victim: int


@dataclass(frozen=True)
class Result:
    """Of one comparison: what was done and how it ended."""

    mode: str
    seed: int
    steps: int
    verdict: Verdict
    faults: list[Fault]
    recoveries: list[Recovery]
    blocked: list[float]
    undisturbed_seconds: float
    seconds: float

    def broken(self, within: float) -> list[str]:
        """The promises that do not hold. within: seconds in which training goes on after a SIGKILL."""
        found = self.verdict.broken(LIMITS[self.mode])
        if len(self.recoveries) < len(self.faults):
            found.append(f"{len(self.faults)} faults were to be survived, {len(self.recoveries)} were")
        for recovery in self.recoveries:
            if not recovery.kept(EVERY):
                found.append(f"{recovery.fault}: {recovery.lost} steps lost, of {EVERY} between checkpoints")
            beyond = recovery.seconds - (recovery.model_seconds or 0)
            if recovery.fault == "worker killed" and beyond > within:
                found.append(f"{recovery.fault}: {beyond:.1f} s until training went on, more than {within:g}")
        return found


def draw(seed: int, kills: int, steps: int, kinds: tuple[str, ...]) -> list[Fault]:
    """The faults of a seed, by step; none in the first steps, nor so late that nothing is left to disturb.

    Kinds are drawn like cards, so that a few faults are not all of one kind.
    """
    chance = random.Random(seed)
    at = sorted(chance.sample(range(3, steps - EVERY), kills))
    cards: list[str] = []
    while len(cards) < kills:
        cards += chance.sample(kinds, len(kinds))
    return [Fault(kind, step, chance.randrange(1000)) for kind, step in zip(cards, at, strict=False)]


# ---------------------------------------------------------------------------------------------- the faults


class Chaos:
    """Does faults to a run."""

    def __init__(self, run: Training, bed: Bed | None, elastic: bool) -> None:
        self._run, self._bed, self._elastic = run, bed, elastic

    def do(self, fault: Fault) -> Recovery:
        """Wait for the fault's step, do it, and see training go on, with a lost host back."""
        self._run.wait_step(fault.step, PATIENCE)
        if self._elastic and self._bed:  # a fault in the middle of growing would be taken for the growing
            whole = len(self._bed.hosts) - 1
            self._run.wait("growth to all workers", lambda: self._run.size() in (None, whole), PATIENCE)
        if fault.kind in WORKER_FAULTS:
            return self._to_worker(fault)
        return self._to_host(fault)

    def _to_worker(self, fault: Fault) -> Recovery:
        self._run.wait("workers", self._run.workers, PATIENCE)
        workers = self._run.workers()
        number = signal.SIGKILL if fault.kind == "worker killed" else signal.SIGSTOP
        victim = workers[fault.victim % len(workers)]
        return self._run.strike(fault.kind, lambda: os.kill(victim, number), PATIENCE)

    def _to_host(self, fault: Fault) -> Recovery:
        bed = self._bed
        assert bed is not None
        host = 1 + fault.victim % (len(bed.hosts) - 1)  # not the head: it is the command's
        lose, give_back = (bed.kill, bed.start_host) if fault.kind == "host loses power" else (bed.cut, bed.heal)
        if self._elastic:
            recovery = self._run.strike(fault.kind, lambda: lose(host), PATIENCE)
            self._run.strike("the host is back", lambda: give_back(host), PATIENCE)
            return recovery

        def lose_for_a_while() -> None:
            lose(host)
            bed.wait_nodes(len(bed.hosts) - 1, PATIENCE)
            give_back(host)

        return self._run.strike(fault.kind, lose_for_a_while, PATIENCE)


# ---------------------------------------------------------------------------------------------- the runs


def write_recipe(folder: Path, mode: str, workers: int, cpus: float, epochs: int) -> Path:
    demo = write_demo(str(folder / "demo"), rows=1500, hidden_size=64, layers=2)
    content: dict[str, Any] = {
        "run": {"name": "undisturbed", "storage": str(folder / "runs")},
        "model": {"path": demo.base},
        "data": {
            "train": [{"path": list(demo.train), "format": "translation", "prompt": PROMPT}],
            "seq_len": 256,
            "ledger": True,
        },
        "train": {
            "strategy": "zero3" if mode == "zero3" else "fsdp",
            "workers": [1, workers] if mode == "elastic" else workers,
            "cpus_per_worker": cpus,
            "global_batch": 4 * workers,
            "micro_batch": 2,
            "epochs": epochs,
            "log_every": 1,
            "optimizer": {"lr": 3e-4},  # at ten times that, learning the rows by heart makes 5e-4 of rounding's 2e-7
            "checkpoint": {"every": EVERY},
            "failures": {"hang_seconds": HANG, "grow_seconds": 5},
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


@contextlib.contextmanager
def place(folder: Path, hosts: int, local: bool) -> Iterator[tuple[Place, Bed | None]]:
    """Hosts in a bed, a worker on each; where there can or shall be none, this machine."""
    if reason := "--local" if local else why_not():
        print(f"no hosts here ({reason}): only workers are killed, on this machine", file=sys.stderr)
        yield Local(), None
        return
    with Bed(hosts + 1, [1] + [2] * hosts, share=[folder]) as bed:
        yield OnBed(bed), bed


def compare(folder: Path, options: argparse.Namespace) -> Result:
    """Train in peace and with faults, and judge."""
    mode, hosts = options.mode, options.hosts
    with place(folder, hosts, options.local) as (where, bed):
        # Of the two CPUs of a host as many that it has room for one worker, and the head for none.
        file = write_recipe(folder, mode, hosts, 1.5 if bed else 1, options.epochs or EPOCHS[mode])
        began = time.monotonic()
        peaceful = Training(where, file, folder / "runs", "undisturbed")
        peaceful.begin()
        expect(peaceful.end(1200) == 0, peaceful)
        undisturbed_seconds = time.monotonic() - began
        recipe, order, steps = described(file, "disturbed")
        faults = draw(options.seed, options.kills, steps, (HOST_FAULTS if bed else ()) + WORKER_FAULTS)
        began, recoveries = time.monotonic(), []
        run = Training(where, file, folder / "runs", "disturbed")
        run.begin()
        chaos = Chaos(run, bed, mode == "elastic")
        for fault in faults:
            recoveries.append(chaos.do(fault))
            print(f"  {show(recoveries[-1])}", file=sys.stderr, flush=True)
        expect(run.end(1200) == 0, run)
    return Result(
        mode,
        options.seed,
        steps,
        judge(recipe.run.dir, RunDir(str(peaceful.run)), order, steps),
        faults,
        recoveries,
        [row["checkpoint_seconds"] for row in read_metrics(recipe.run.dir) if "checkpoint_seconds" in row],
        undisturbed_seconds,
        time.monotonic() - began,
    )


def described(file: Path, name: str) -> tuple[Recipe, Any, int]:
    """The recipe of a run over data that are prepared, its order and its number of steps."""
    recipe = recipes.load(str(file), [f"run.name={name}"])
    order = launch.prepare_data(recipe, View(Console(quiet=True)), stream.in_process).order
    return recipe, order, total_steps(recipe, order)


def expect(good: bool, run: Training) -> None:
    if not good:
        sys.exit(f"{run.name} failed:\n{run.output()}")


# ---------------------------------------------------------------------------------------------- what it shows


def show(recovery: Recovery) -> str:
    model = "" if recovery.model_seconds is None else f", {recovery.model_seconds:.1f} of them for the model"
    return (
        f"{recovery.fault} at step {recovery.step}: on after {recovery.seconds:.1f} s{model}; "
        f"{recovery.lost} steps lost"
    )


def table(result: Result, broken: list[str]) -> Table:
    shown = Table(title=f"{result.mode}, seed {result.seed}: {result.steps} steps, {len(result.faults)} faults")
    shown.add_column("promise")
    shown.add_column("seen")
    verdict, recoveries = result.verdict, result.recoveries
    kinds = sorted({recovery.fault for recovery in recoveries})
    shown.add_row("each row exactly once per epoch", "yes" if not verdict.rows else f"no: {verdict.rows}")
    shown.add_row("loss of each step, largest difference", difference(verdict.loss))
    shown.add_row("final weights, largest difference", difference(verdict.weights))
    shown.add_row("last checkpoint, weights and optimizer, bit-equal", "yes" if verdict.bits else "no")
    for kind in kinds:
        seconds = [recovery.seconds for recovery in recoveries if recovery.fault == kind]
        shown.add_row(f"seconds to the next step, {kind} × {len(seconds)}", spread(seconds))
    models = [recovery.model_seconds for recovery in recoveries if recovery.model_seconds is not None]
    shown.add_row("  of which loading the model", spread(models))
    lost = max((recovery.lost for recovery in recoveries), default=0)
    shown.add_row(f"steps lost per fault (of {EVERY} between checkpoints)", f"max {lost}")
    shown.add_row(f"seconds blocked per checkpoint × {len(result.blocked)}", spread(result.blocked, 3))
    shown.add_row("seconds of the run, undisturbed", f"{result.seconds:.0f}, {result.undisturbed_seconds:.0f}")
    shown.caption = "all promises kept" if not broken else "\n".join(f"[red]broken:[/] {line}" for line in broken)
    return shown


def difference(value: float) -> str:
    if value == float("inf"):
        return "other steps, or not a number"
    return "0" if value == 0 else f"{value:.1e}"


def spread(values: list[float], digits: int = 1) -> str:
    return f"median {statistics.median(values):.{digits}f}, max {max(values):.{digits}f}" if values else "not known"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--mode", choices=list(LIMITS), default="fsdp")
    parser.add_argument("--hosts", type=int, default=2, help="hosts with a worker, beside the head")
    parser.add_argument("--within", type=float, default=LOST, help="seconds to go on in after a SIGKILL")
    parser.add_argument("--epochs", type=int, help="of each run; default: 8, elastic 16")
    parser.add_argument("--local", action="store_true", help="workers of this machine alone, as where there is no root")
    parser.add_argument("--out", help="file of the result; default: chaos-<mode>-<seed>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray_ft_chaos_") as scratch:
        result = compare(Path(scratch), options)
    broken = result.broken(options.within)
    Console(width=120).print(table(result, broken))
    out = Path(options.out or f"chaos-{options.mode}-{options.seed}.json")
    out.write_text(json.dumps({**dataclasses.asdict(result), "broken": broken}, indent=1) + "\n")
    print(f"written: {out}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
