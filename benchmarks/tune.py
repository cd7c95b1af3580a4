"""What a sweep saves: ASHA against plain random search over the same trials, and against Ray Tune's own ASHA.

    python -m benchmarks.tune [--pairs 1] [--trials 16] [--steps 320] [--quick] [--to FILE]

Three ways to go through the same settings (the demo; learning rate × warm-up × weight decay):

    random   scheduler: none: every trial goes to the end; evaluated once, there, so that it costs as little as it can
    asha     scheduler: asha, as ray-ft has it: a trial waits on a rung until it is among the best (promotion)
    peer     Ray Tune's AsyncHyperBandScheduler on the same rungs, put in the place of ours: a trial that is better than
             most before it runs on, and none waits (stopping); all else is ray-ft's own

Each sweep is a `ray-ft tune` process of its own with a private Ray that begins and ends with it, so that all that a
person pays for is counted, the start of each process too. Rows are prepared before. The seed gives the settings of each
trial by number, the same in all three (checked), and the order of the rows. Sweeps run one after the other: random,
asha, peer for one seed, backwards for the next.

Compared are device-seconds (the sweep's own count: for how long trials held their place, times their workers),
CPU-seconds (user and system, of all processes of a sweep; counted by the kernel, also of those that are killed),
steps trained in all, wall seconds of the command, and the final metric of the best trial. With the default settings,
ASHA takes at best 6.4 times fewer steps than full runs: 16 trials × 1/16 + 4 × 3/16 + 1 × 3/4 = 2.5 runs of 16. The
other figures come nearer to that the longer a trial is: each start of a trial's process costs some seconds (about 4 of
a device, 5 to 6 of a CPU), and with promotion there are some more starts than trials.

A pair is a seed. One takes about 12 minutes on two idle cores; several, as a figure to quote needs, as many times as
long. --quick, 4 short trials, takes 2, and says nothing about ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.result import Figure, Result, Table, recorded
from benchmarks.result import options as common_options
from ray_ft import demo
from ray_ft import recipe as recipes
from ray_ft.data import stream
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.train.metrics import read_metrics
from ray_ft.tune.journal import Sweep
from ray_ft.tune.rungs import Rungs
from ray_ft.view import View

ARMS = ("random", "asha", "peer")
MEASURES = {"device_seconds": "device-seconds", "cpu_seconds": "CPU-seconds", "steps": "steps", "seconds": "wall s"}
AIM = 3.0  # times fewer device-seconds than random search
ETA, FIRST = 4, 0.0625
SIZES = {"trials": 16, "steps": 320}
QUICK = {"trials": 4, "steps": 16}


@dataclass(frozen=True)
class Swept:
    """What one sweep came to.

    Attributes:
        cpu_seconds: None where the kernel does not count them.
        steps: trained in all, of trials that were stopped too.
        ended: trials by how they ended.
        value: the final metric of the best trial; `finals` of each trial that went to the end, by number.
        load: one-minute load average when it began.
    """

    arm: str
    seed: int
    device_seconds: float
    cpu_seconds: float | None
    steps: int
    seconds: float
    ended: dict[str, int]
    best: int
    value: float
    finals: dict[int, float]
    settings: dict[int, dict[str, Any]]
    load: float


# ------------------------------------------------------------------------------------------------------ the sweeps


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    made = demo.write_demo(str(folder / "demo"), hidden_size=options.hidden, layers=options.layers)
    rows = {"format": "translation", "prompt": demo.PROMPT}
    content: dict[str, Any] = {
        "run": {"storage": str(folder / "runs")},
        "model": {"path": made.base},
        "data": {
            "train": [{"path": list(made.train), **rows}],
            "eval": [{"path": made.heldout, **rows}],
            "seq_len": 256,
        },
        "train": {
            "workers": 0,
            "device": "cpu",
            "global_batch": 8,
            "micro_batch": 8,
            "max_steps": options.steps,
            "log_every": 1,  # so that steps after the last report are counted
            "checkpoint": {"every": options.steps},
        },
        "tune": {
            "space": {
                "train.optimizer.lr": {"loguniform": [3e-4, 3e-2]},
                # Longer than to the first rung, it would be compared before its learning rate is there.
                "train.schedule.warmup_steps": {"randint": [0, options.steps // 16]},
                "train.optimizer.weight_decay": {"loguniform": [1e-3, 1.0]},
            },
            "trials": options.trials,
            "concurrency": options.at_once,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


def overrides(arm: str, seed: int, steps: int) -> list[str]:
    found = [f"run.name={arm}-{seed}", f"run.seed={seed}", f"tune.seed={seed}"]
    if arm == "random":
        return [*found, "tune.scheduler=none", f"train.eval_every={steps}"]
    return [*found, "tune.scheduler=asha", f"tune.asha={{eta: {ETA}, first: {FIRST}}}"]


def sweep(file: Path, arm: str, seed: int, steps: int) -> Swept:
    """Run one sweep as its own process."""
    changes = overrides(arm, seed, steps)
    recipe = recipes.load(str(file), changes)
    launch.prepare_data(recipe, View(Console(quiet=True)), stream.in_process)
    program = ["-m", "benchmarks.tune", "--as-peer"] if arm == "peer" else ["-m", "ray_ft"]
    log = file.parent / f"{arm}-{seed}.log"
    load, began = os.getloadavg()[0], time.monotonic()
    with cpu_clock() as clock, log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *program, "tune", str(file), *changes],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": "local"},  # on somebody's cluster its processes could not be counted
        )
        try:
            process.wait()
        finally:
            if process.poll() is None:  # the benchmark is being ended: so is the sweep, with its Ray
                process.terminate()
                process.wait()
        seconds, cpu_seconds = time.monotonic() - began, clock()
    if process.returncode:
        sys.exit(f"{arm}, seed {seed}: ray-ft tune exited with {process.returncode}\n{log.read_text()[-4000:]}")
    return read(recipe, arm, seed, seconds, cpu_seconds, load)


def read(recipe: Recipe, arm: str, seed: int, seconds: float, cpu_seconds: float | None, load: float) -> Swept:
    found = Sweep.load(recipe.run.dir.root)
    best = found.best()
    if best is None or best.status != "finished" or best.value is None:
        sys.exit(f"{arm}, seed {seed}: no trial went to the end\n{recipe.run.dir.root}")
    trials = dict(sorted(found.trials.items()))
    states = [trial.status for trial in trials.values()]
    return Swept(
        arm,
        seed,
        found.device_seconds,
        cpu_seconds,
        sum(int(rows[-1]["step"]) for trial in trials.values() if (rows := read_metrics(found.run_of(trial)))),
        seconds,
        {status: states.count(status) for status in sorted(set(states))},
        best.number,
        best.value,
        {
            number: trial.value
            for number, trial in trials.items()
            if trial.status == "finished" and trial.value is not None
        },
        {number: trial.settings for number, trial in trials.items()},
        load,
    )


def as_peer() -> None:
    """`ray-ft` with Ray Tune's scheduler where ours is made. Its settings are those of the recipe's tune.asha."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    from ray_ft.cli import main as ray_ft
    from ray_ft.tune import schedule

    def make(space: Any, tune: Any, *_: Any) -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            time_attr=schedule.PROGRESS,
            metric=tune.metric,
            mode=tune.mode,
            max_t=1,
            grace_period=tune.asha.first,
            reduction_factor=tune.asha.eta,
        )

    schedule.make = make  # type: ignore[assignment]
    ray_ft()


# ---------------------------------------------------------------------------------------------------- CPU-seconds


@contextlib.contextmanager
def cpu_clock() -> Iterator[Any]:
    """Gives a function: CPU-seconds so far of all processes that the block starts, or None where they are not counted.

    A counter of the kernel (perf_event_open: task clock, inherited by threads and processes), as rusage knows only
    children that somebody waited for, and of a killed process a look now and then misses the end.
    """
    call = {"x86_64": 298, "aarch64": 241}.get(platform.machine()) if sys.platform == "linux" else None
    libc = ctypes.CDLL(None, use_errno=True)
    # struct perf_event_attr: type software, size, config task clock, then flags: inherit, and the two exclusions that
    # ordinary users must ask for (a task clock counts the kernel's time all the same).
    attributes = struct.pack("=IIQQQQQ", 1, 112, 1, 0, 0, 0, 1 << 1 | 1 << 5 | 1 << 6).ljust(112, b"\0")
    counter = -1 if call is None else libc.syscall(call, attributes, 0, -1, -1, 1 << 3)  # this thread; close on exec
    if counter < 0:
        why = os.strerror(ctypes.get_errno()) if call else "only known on Linux"
        print(f"CPU-seconds are not counted: perf_event_open: {why}", file=sys.stderr)
        yield lambda: None
        return
    own = time.thread_time()
    try:
        yield lambda: struct.unpack("Q", os.read(counter, 8))[0] / 1e9 - (time.thread_time() - own)
    finally:
        os.close(counter)


# --------------------------------------------------------------------------------------------------- what it shows


def limit(trials: int) -> float:
    """How many times fewer steps at best: full runs of all against those of each rung, of whom 1/eta go on."""
    rungs = [*Rungs(trials, FIRST, ETA, 1).milestones, 1.0]
    shares, going = rungs[0] * trials, trials
    for below, above in itertools.pairwise(rungs):
        going = max(going // ETA, 1)
        shares += going * (above - below)
    return trials / shares


def by_seed(results: Sequence[Swept]) -> dict[int, dict[str, Swept]]:
    seeds = sorted({result.seed for result in results})
    return {seed: {result.arm: result for result in results if result.seed == seed} for seed in seeds}


def ratios(results: Sequence[Swept], arm: str, measure: str) -> list[float]:
    """random ÷ arm, by seed."""
    pairs = [(getattr(of["random"], measure), getattr(of[arm], measure)) for of in by_seed(results).values()]
    return [full / early for full, early in pairs if full is not None and early is not None]


def check_same(results: Sequence[Swept]) -> None:
    """Ends the benchmark where the newest sweep had other settings than those of the same seed before it."""
    last = results[-1]
    for other in results:
        if other.seed == last.seed and other.settings != last.settings:
            sys.exit(f"seed {last.seed}: {last.arm} had other settings than {other.arm}")


def apart(results: Sequence[Swept]) -> float:
    """Largest relative difference between the final metrics of one trial, in random search and another arm."""
    found = [0.0]
    for of in by_seed(results).values():
        full = of["random"].finals
        for one in of.values():
            found += [abs(value - full[at]) / abs(full[at]) for at, value in one.finals.items() if at in full]
    return max(found)


def rank(of: dict[str, Swept], arm: str) -> str:
    """Of the trial that an arm found best, among all trials at the end of random search: 1 is the best."""
    finals, best = of["random"].finals, of[arm].best
    return f"{sum(value < finals[best] for value in finals.values()) + 1}" if best in finals else "failed there"


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def sweeps_table(results: Sequence[Swept], metric: str) -> Table:
    rows = []
    for one in sorted(results, key=lambda one: (one.seed, ARMS.index(one.arm))):
        figures = [number(getattr(one, measure)) for measure in MEASURES]
        failed = f", {one.ended['failed']} failed" if "failed" in one.ended else ""
        ended = f"{one.ended['finished']} of {sum(one.ended.values())}{failed}"
        rank_of = rank(by_seed(results)[one.seed], one.arm)
        rows.append((one.seed, one.arm, *figures, ended, one.best, rank_of, f"{one.value:.4f}", f"{one.load:.1f}"))
    columns = (
        "seed",
        "sweep",
        *MEASURES.values(),
        "to the end",
        "best trial",
        "its rank of all",
        metric,
        "load before",
    )
    return Table("Each sweep", columns, rows)


def figures(results: Sequence[Swept], metric: str) -> list[Figure]:
    seeds = by_seed(results).values()
    found = []
    for arm, name in (("asha", "ASHA"), ("peer", "Ray Tune's AsyncHyperBandScheduler")):
        for measure, what in MEASURES.items():
            aim = AIM if (arm, measure) == ("asha", "device_seconds") else None
            if of := ratios(results, arm, measure):
                found.append(Figure(f"{what}, random search ÷ {name}", of, at_least=aim, form="{:.2f}"))
        above = [of[arm].value / of["random"].value for of in seeds]
        found.append(Figure(f"{metric} of its best, {name} ÷ random search", above))
    return found


def main() -> None:
    parser = common_options(__doc__, 1)
    parser.add_argument("--trials", type=int, help=f"of each sweep; default: {SIZES['trials']}")
    parser.add_argument("--steps", type=int, help=f"of a whole trial, a multiple of 16; default: {SIZES['steps']}")
    parser.add_argument("--at-once", type=int, default=2, help="trials that run at once, each on one core")
    parser.add_argument("--hidden", type=int, default=64, help="width of the demo's model")
    parser.add_argument("--layers", type=int, default=2, help="of the demo's model")
    parser.add_argument("--quick", action="store_true", help="a smoke run; sizes that are given are kept")
    given = parser.parse_args()
    for name, value in (QUICK if given.quick else SIZES).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.steps % (1 / FIRST) or given.steps < 1:
        parser.error(f"--steps {given.steps}: a multiple of {1 / FIRST:g}, so that every rung is a whole step")
    if min(given.pairs, given.trials, given.at_once) < 1:
        parser.error("--pairs, --trials and --at-once are 1 or more")
    conditions = {
        "data": f"the demo's, prepared before; {given.trials} trials of {given.steps} steps, {given.at_once} at once",
        "threads": "1 for each trial",
        "flops": "none counted",
        "clipping": "1.0",
        "padding": "packed to 256 tokens",
        "most that ASHA can save": f"{limit(given.trials):.1f} times the steps (eta {ETA}, first rung at {FIRST:g})",
    }
    about = "A: the same trials, stopped early by ASHA, and by Ray Tune's own. B: random search, each trial to its end."
    with (
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
        recorded("tune", about, conditions, given) as result,
    ):
        _measure(Path(scratch), given, result)


def _measure(scratch: Path, given: argparse.Namespace, result: Result) -> None:
    results: list[Swept] = []
    file = write_recipe(scratch, given)
    metric = recipes.load(str(file), overrides("asha", 0, given.steps)).tune.metric  # type: ignore[union-attr]
    for seed in range(given.pairs):
        for arm in ARMS if seed % 2 == 0 else reversed(ARMS):
            results.append(sweep(file, arm, seed, given.steps))
            check_same(results)
            print(show(results[-1], metric), file=sys.stderr, flush=True)
    result.figures += figures(results, metric)
    name = f"largest relative difference of one trial's {metric} between sweeps"
    result.figures.append(Figure(name, [apart(results)], form="{:.1e}"))
    result.tables.append(sweeps_table(results, metric))
    result.raw = [asdict(one) for one in results]


def show(result: Swept, metric: str) -> str:
    found = ", ".join(f"{number(getattr(result, measure))} {name}" for measure, name in MEASURES.items())
    return f"seed {result.seed}, {result.arm}: {found}; best: trial {result.best}, {metric} {result.value:.4f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-peer"]:
        del sys.argv[1]
        as_peer()
    else:
        main()
