"""Runs parts in processes of their own, one on the GPU at a time, within the time of the whole.

A part that hangs is ended with all that it started; one that fails costs its own rows; what was found before stays,
also where this process is told to end (SIGTERM). Parts that need no GPU run beside the others, from the beginning.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Part

GRACE = 8.0  # seconds that a part may take to end by itself once its time is over
REST = 6.0  # seconds of the whole that are kept for the tables
TOLD = "the whole was told to end"


class _Told(BaseException):
    """This process is to end."""


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    rows: Path
    log: Path
    ends: float

    def end(self) -> list[dict[str, Any]]:
        """Wait until it has ended, or its time is over; its rows, and one more where it did not end well."""
        why = ""
        try:
            self.process.wait(max(self.ends + GRACE - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            why = f"ended after {GRACE:.0f} s beyond its time, in which it did not end by itself"
        return self.stop(why)

    def stop(self, why: str = "") -> list[dict[str, Any]]:
        """End it; its rows, and one more that says why, or what it failed with."""
        self.kill()
        self.process.wait()
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        found = newest([json.loads(line) for line in lines if line.endswith("}")])
        if not why and self.process.returncode:
            said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            why = f"failed ({self.process.returncode}): {said[-1] if said else 'without a word'}"[:300]
        return [*found, {"part": self.name, "why": why}] if why else found

    def kill(self) -> None:
        """The process and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def newest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, of each case's with steps the last: it has all of them."""
    last = {row["case"]: at for at, row in enumerate(rows) if "step_seconds" in row}
    return [row for at, row in enumerate(rows) if "step_seconds" not in row or last[row["case"]] == at]


def run(
    parts: Mapping[str, Part], names: Sequence[str], seconds: float, device: str, small: bool, steps: int
) -> list[dict[str, Any]]:
    """Rows of the parts in the order of `names`, each with `part`; of what did not fit in `seconds` why."""
    deadline = time.monotonic() + seconds - REST
    found: list[dict[str, Any]] = []
    going: list[_Running] = []
    waiting = [name for name in names if parts[name].gpu]

    def told(*_: Any) -> None:
        raise _Told

    before = signal.signal(signal.SIGTERM, told)
    with tempfile.TemporaryDirectory(prefix="ray_ft_gpu_") as scratch:

        def start(name: str, limit: float) -> _Running:
            rows, log = Path(scratch, f"{name}.jsonl"), Path(scratch, f"{name}.log")
            rows.touch()
            command = child_command(name, str(rows), f"{limit:.1f}", device, str(steps), *["small"] * small)
            environment = dict(os.environ)
            if small:  # threads that wait for each other are slower than one on what is so small
                environment.setdefault("OMP_NUM_THREADS", "1")
            if device == "cuda" and not parts[name].gpu:
                environment["CUDA_VISIBLE_DEVICES"] = ""  # a context would take memory from the others
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            going.append(_Running(name, process, rows, log, time.monotonic() + limit))
            return going[-1]

        def keep(one: _Running, rows: list[dict[str, Any]]) -> None:
            going.remove(one)
            found.extend(rows)
            for row in rows:
                print(f"  {brief(row)}", file=sys.stderr, flush=True)

        try:
            beside = [
                start(name, min(parts[name].limit, seconds - REST - GRACE)) for name in names if not parts[name].gpu
            ]
            while waiting:
                name = waiting[0]
                left = deadline - time.monotonic() - GRACE
                if left < parts[name].least:
                    why = f"did not fit in the time: {max(left, 0):.0f} s were left of {parts[name].least:.0f} it needs"
                    found.append({"part": name, "why": why})
                else:
                    print(f"{name}: {parts[name].does} …", file=sys.stderr, flush=True)
                    one = start(name, min(parts[name].limit, left))
                    keep(one, one.end())
                waiting.pop(0)
            for one in beside:
                one.ends = min(one.ends, deadline - GRACE)
                keep(one, one.end())
        except _Told:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was found is still to be written
            running = [one.name for one in going]
            for one in going:
                keep(one, one.stop(TOLD))
            found += [{"part": name, "why": TOLD} for name in waiting if name not in running]
        finally:
            for one in going:
                if one.process.poll() is None:
                    one.kill()
                    one.process.wait()
            if signal.getsignal(signal.SIGTERM) is told:
                signal.signal(signal.SIGTERM, before)
    return found


def child_command(name: str, rows: str, *more: str) -> list[str]:
    """What runs a part; see `child`."""
    return [sys.executable, "-m", "benchmarks.gpu.child", name, rows, *more]


def brief(row: dict[str, Any]) -> str:
    """A row as it comes, in a line: numbers without their series."""
    parts = [f"{key} {_short(value)}" for key, value in row.items() if key not in ("part", "step_seconds")]
    if "step_seconds" in row:
        parts.append(f"step {sorted(row['step_seconds'])[len(row['step_seconds']) // 2]:.3f} s")
    return ", ".join(parts)[:300]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
