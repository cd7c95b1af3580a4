"""What a sweep saves: ASHA against plain random search over the same trials, and against Ray Tune's own ASHA.

    python benchmarks/tune.py [--seeds 1] [--trials 16] [--steps 320] [--quick] [--json FILE]

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

One seed takes about 12 minutes on two idle cores; several, as a figure to quote needs, as many times as long. --quick,
4 short trials of one seed, takes 2, and says nothing about ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import platform
import signal
import statistics
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
from rich.table import Table

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
SIZES = {"seeds": 1, "trials": 16, "steps": 320}
QUICK = {"seeds": 1, "trials": 4, "steps": 16}


@dataclass(frozen=True)
class Result:
    """Of one sweep.

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


def sweep(file: Path, arm: str, seed: int, steps: int) -> Result:
    """Run one sweep as its own process."""
    changes = overrides(arm, seed, steps)
    recipe = recipes.load(str(file), changes)
    launch.prepare_data(recipe, View(Console(quiet=True)), stream.in_process)
    program = [__file__, "--as-peer"] if arm == "peer" else ["-m", "ray_ft"]
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


def read(recipe: Recipe, arm: str, seed: int, seconds: float, cpu_seconds: float | None, load: float) -> Result:
    found = Sweep.load(recipe.run.dir.root)
    best = found.best()
    if best is None or best.status != "finished" or best.value is None:
        sys.exit(f"{arm}, seed {seed}: no trial went to the end\n{recipe.run.dir.root}")
    trials = dict(sorted(found.trials.items()))
    states = [trial.status for trial in trials.values()]
    return Result(
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


def by_seed(results: Sequence[Result]) -> dict[int, dict[str, Result]]:
    seeds = sorted({result.seed for result in results})
    return {seed: {result.arm: result for result in results if result.seed == seed} for seed in seeds}


def ratios(results: Sequence[Result], arm: str, measure: str) -> list[float]:
    """random ÷ arm, by seed."""
    pairs = [(getattr(of["random"], measure), getattr(of[arm], measure)) for of in by_seed(results).values()]
    return [full / early for full, early in pairs if full is not None and early is not None]


def check_same(results: Sequence[Result]) -> None:
    """Ends the benchmark where the newest sweep had other settings than those of the same seed before it."""
    last = results[-1]
    for other in results:
        if other.seed == last.seed and other.settings != last.settings:
            sys.exit(f"seed {last.seed}: {last.arm} had other settings than {other.arm}")


def apart(results: Sequence[Result]) -> float:
    """Largest relative difference between the final metrics of one trial, in random search and another arm."""
    found = [0.0]
    for of in by_seed(results).values():
        full = of["random"].finals
        for one in of.values():
            found += [abs(value - full[at]) / abs(full[at]) for at, value in one.finals.items() if at in full]
    return max(found)


def rank(of: dict[str, Result], arm: str) -> str:
    """Of the trial that an arm found best, among all trials at the end of random search: 1 is the best."""
    finals, best = of["random"].finals, of[arm].best
    return f"{sum(value < finals[best] for value in finals.values()) + 1}" if best in finals else "failed there"


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def sweeps_table(results: Sequence[Result], metric: str) -> Table:
    table = Table(title="one row for each sweep")
    for name in ("seed", "", *MEASURES.values(), "to the end", "best trial", metric, "load before"):
        table.add_column(name, justify="left" if not name else "right")
    for seed, of in by_seed(results).items():
        for arm in ARMS:
            one = of[arm]
            figures = [number(getattr(one, measure)) for measure in MEASURES]
            failed = f", {one.ended['failed']} failed" if "failed" in one.ended else ""
            ended = f"{one.ended['finished']} of {sum(one.ended.values())}{failed}"
            table.add_row(str(seed), arm, *figures, ended, str(one.best), f"{one.value:.4f}", f"{one.load:.1f}")
        table.add_section()
    for arm in ARMS:
        of_arm = [one for one in results if one.arm == arm]
        middle = [median([getattr(one, measure) for one in of_arm]) for measure in MEASURES]
        value = f"{statistics.median(one.value for one in of_arm):.4f}"
        table.add_row("median", arm, *map(number, middle), "", "", value, "")
    return table


def median(values: Sequence[float | None]) -> float | None:
    counted = [value for value in values if value is not None]
    return statistics.median(counted) if counted else None


def ratio_table(results: Sequence[Result], metric: str, trials: int) -> Table:
    table = Table(title="random search ÷ ASHA: median (least … most) over seeds")
    table.add_column("")
    for name in ("ray-ft's ASHA", "Ray Tune's AsyncHyperBandScheduler"):
        table.add_column(name, justify="right")
    for measure, name in MEASURES.items():
        row = []
        for arm in ARMS[1:]:
            found = ratios(results, arm, measure)
            row.append(f"{statistics.median(found):.2f} ({min(found):.2f} … {max(found):.2f})" if found else "–")
        table.add_row(name, *row)
    seeds = by_seed(results).values()
    rows = [[(of[arm].value - of["random"].value) / abs(of["random"].value) for of in seeds] for arm in ARMS[1:]]
    table.add_row(
        f"{metric} of its best, above random's",
        *(f"{statistics.median(row):+.1%} ({min(row):+.1%} … {max(row):+.1%})" for row in rows),
    )
    ranks = [[rank(of, arm) for of in seeds] for arm in ARMS[1:]]
    table.add_row("its rank among all, by seed", *(", ".join(row) for row in ranks))
    device = statistics.median(ratios(results, "asha", "device_seconds"))
    table.caption = (
        f"steps: at best {limit(trials):.1f} by arithmetic ({trials} trials, eta {ETA}, first rung at {FIRST:g} of a "
        f"run); aim ≥ {AIM:g} in device-seconds: {'reached' if device >= AIM else 'not reached'}, by the {metric} above"
    )
    return table


def machine() -> dict[str, Any]:
    import psutil
    import ray
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help=f"as many; default: {SIZES['seeds']}")
    parser.add_argument("--trials", type=int, help=f"of each sweep; default: {SIZES['trials']}")
    parser.add_argument("--steps", type=int, help=f"of a whole trial, a multiple of 16; default: {SIZES['steps']}")
    parser.add_argument("--at-once", type=int, default=2, help="trials that run at once, each on one core")
    parser.add_argument("--hidden", type=int, default=64, help="width of the demo's model")
    parser.add_argument("--layers", type=int, default=2, help="of the demo's model")
    parser.add_argument("--quick", action="store_true", help="a smoke run; sizes that are given are kept")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else SIZES).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps % (1 / FIRST) or options.steps < 1:
        parser.error(f"--steps {options.steps}: a multiple of {1 / FIRST:g}, so that every rung is a whole step")
    if min(options.seeds, options.trials, options.at_once) < 1:
        parser.error("--seeds, --trials and --at-once are 1 or more")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or a sweep would outlive this process
    load, about = os.getloadavg(), machine()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch:
        file = write_recipe(Path(scratch), options)
        metric = recipes.load(str(file), overrides("asha", 0, options.steps)).tune.metric  # type: ignore[union-attr]
        for seed in range(options.seeds):
            for arm in ARMS if seed % 2 == 0 else reversed(ARMS):
                results.append(sweep(file, arm, seed, options.steps))
                check_same(results)
                print(show(results[-1], metric), flush=True)
    end = os.getloadavg()
    difference = apart(results)
    if options.json:
        facts = {"machine": about, "load_before": load, "load_after": end, "limit": limit(options.trials)}
        summary = {arm: {measure: ratios(results, arm, measure) for measure in MEASURES} for arm in ARMS[1:]}
        content = {
            "options": {name: value for name, value in vars(options).items() if name != "json"},
            **facts,
            "random_divided_by": summary,
            "largest_difference_of_one_trial": difference,
            "sweeps": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=150)
    console.print(
        f"{about['cores']} × {about['cpu']}, {about['memory_gib']} GiB, {about['system']}; Python {about['python']}, "
        f"ray {about['ray']}, torch {about['torch']}, transformers {about['transformers']}; load average "
        f"{load[0]:.2f} at the start, {end[0]:.2f} at the end",
        highlight=False,
    )
    same = f"up to {difference:.1e} another" if difference else "the same"
    console.print(
        f"{options.trials} trials of {options.steps} steps, {options.at_once} at once; a trial that went to the end in "
        f"random search and another has {same} final {metric}",
        highlight=False,
    )
    console.print(sweeps_table(results, metric))
    console.print(ratio_table(results, metric, options.trials))


def show(result: Result, metric: str) -> str:
    figures = ", ".join(f"{number(getattr(result, measure))} {name}" for measure, name in MEASURES.items())
    return f"seed {result.seed}, {result.arm}: {figures}; best: trial {result.best}, {metric} {result.value:.4f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-peer"]:
        del sys.argv[1]
        as_peer()
    else:
        main()
