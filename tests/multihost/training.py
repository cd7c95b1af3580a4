"""A run of `ray-ft train` as a person starts it, followed step by step while faults are done to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_ft.train import checkpoint

from . import inside, process
from .testbed import Background, Bed

WORKER = "^ray::RayTrainWorker"
DEALER = "^ray::SplitCoordinator"
RESUMED = re.compile(r"(?:training goes on|resuming \S+) at step (\d+) of")
SIZE = re.compile(r"training goes on at step \d+ of \d+ with (\d+) workers?\b")
MODEL = re.compile(r"model in ([\d.]+) s")
POLL = 0.05  # seconds


class Place(Protocol):
    """Where a run's processes are."""

    def begin(self, command: Sequence[str], log: Path) -> Any:
        """Start the run's command; gives what has poll, wait and signal, as `testbed.Background`."""

    def find(self, pattern: str) -> list[int]:
        """Process ids whose command lines match."""


class OnBed:
    """A run whose command is given on the bed's head."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    def begin(self, command: Sequence[str], log: Path) -> Background:
        started: Background = self.bed.shell(0, command, background=True, log=log)
        return started

    def find(self, pattern: str) -> list[int]:
        hosts = [host for host, init in enumerate(self.bed.hosts) if init is not None]
        return [pid for host in hosts for pid in self.bed.processes(host, pattern)]

    def host_of(self, pid: int) -> int:
        space = os.readlink(f"/proc/{pid}/ns/pid")
        for host, init in enumerate(self.bed.hosts):
            if init is not None and os.readlink(f"/proc/{init}/ns/pid") == space:
                return host
        raise ProcessLookupError(f"process {pid} is on no host")


class Local:
    """A run with a private Ray on this machine: no hosts, but processes that can be killed."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None

    def begin(self, command: Sequence[str], log: Path) -> Background:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with log.open("ab") as out:
            running = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=inside.REPOSITORY
            )
        self._running = running
        return Background(running, running.pid, log)

    def find(self, pattern: str) -> list[int]:
        """Of the processes below the command."""
        found, above = [], [self._running.pid] if self._running else []
        while above:
            for pid in process.children(above.pop()):
                above.append(pid)
                if re.search(pattern, process.command_line(pid)):
                    found.append(pid)
        return sorted(found)


@dataclass(frozen=True)
class Recovery:
    """From a fault to the next finished step.

    Attributes:
        step: the last one finished before the workers were gone.
        committed: the newest checkpoint that was complete when the fault was done.
        resumed: the step that training went on after.
        seconds: from the fault until a step after `resumed` was finished.
        model_seconds: of these, for building and restoring the model; None where the output does not say.
    """

    fault: str
    step: int
    committed: int
    resumed: int
    seconds: float
    model_seconds: float | None

    @property
    def lost(self) -> int:
        """Steps that are taken again."""
        return max(self.step - self.resumed, 0)

    def kept(self, every: int) -> bool:
        """Whether no more than one interval between checkpoints was lost, beside what the fault itself cut short.

        A checkpoint is written behind the back of training, so one whose writing the fault cut short may lack. What
        was complete has to be used.
        """
        due = self.step // every * every
        return self.resumed >= max(self.committed, due - every)


class Training:
    """One run by its recipe file; the command may be given several times.

    Args:
        storage: the recipe's run.storage.
    """

    def __init__(self, place: Place, recipe: Path, storage: Path, name: str, overrides: Sequence[str] = ()) -> None:
        self.place, self.name, self.run = place, name, storage / name
        self._command = [sys.executable, "-m", "ray_ft", "train", str(recipe), f"run.name={name}", *overrides]
        self._storage = storage
        self._process: Any = None
        self._logs: list[Path] = []
        self._step = 0

    # ------------------------------------------------------------------------------------------------- the command

    def begin(self) -> None:
        """Give the command, for the first time or again."""
        log = self._storage / f"{self.name}-{len(self._logs)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        log.touch()
        self._logs.append(log)
        self._process = self.place.begin(self._command, log)

    def end(self, timeout: float) -> int:
        """Wait for the command's end. Returns its exit status."""
        end = time.monotonic() + timeout
        while (status := self._process.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{self.name} has not ended after {timeout:.0f} s, step {self.step()}:\n{self.output()}"
                )
            time.sleep(POLL)
        return int(status)

    def signal(self, number: int) -> None:
        """To the command itself, Ray's driver."""
        self._process.signal(number)

    def output(self) -> str:
        """What the command printed, over all times that it was given; line breaks are spaces."""
        return " ".join(" ".join(log.read_text(errors="replace") for log in self._logs).split())

    def _state(self) -> str:
        return f"step {self.step()}, it printed:\n{self.output()[-4000:]}"

    # ---------------------------------------------------------------------------------------------------- progress

    def step(self) -> int:
        """The last finished step, as metrics.jsonl says."""
        with contextlib.suppress(OSError):
            content = (self.run / "metrics.jsonl").read_bytes()
            lines = content[: content.rfind(b"\n") + 1].splitlines()
            if lines:
                self._step = int(json.loads(lines[-1])["step"])
        return self._step

    def committed(self) -> int:
        """The newest checkpoint that is complete."""
        return max(checkpoint.steps(str(self.run / "checkpoints")), default=0)

    def wait(self, what: str, condition: Callable[[], Any], timeout: float) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: it does not in time.
            RuntimeError: the command ends before.
        """
        end = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None and not condition():
                raise RuntimeError(f"{self.name} ended with {self._process.poll()} before {what}: {self._state()}")
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{self.name}: no {what} after {timeout:.0f} s, step {self.step()}:\n{self.output()}"
                )
            time.sleep(POLL)

    def wait_step(self, step: int, timeout: float = 240) -> None:
        self.wait(f"step {step}", lambda: self.step() >= step, timeout)

    def resumptions(self) -> list[int]:
        """The steps that training went on after, one for each interruption so far."""
        return [int(found) for found in RESUMED.findall(self.output())]

    def size(self) -> int | None:
        """Workers that training last went on with; None before any interruption."""
        sizes = SIZE.findall(self.output())
        return int(sizes[-1]) if sizes else None

    def workers(self) -> list[int]:
        """Process ids of the training workers."""
        return self.place.find(WORKER)

    # ------------------------------------------------------------------------------------------------------- faults

    def strike(self, fault: str, do: Callable[[], Any], timeout: float = 240) -> Recovery:
        """Do a fault, and wait until a step after the one that training went on at is finished."""
        before = len(self.resumptions())
        highest, rows = self.step(), self._rows()
        committed = self.committed()
        struck = time.monotonic()
        do()

        def going_on() -> bool:
            nonlocal highest
            if len(self.resumptions()) > before:
                return True
            highest = max(highest, self.step())
            return False

        def further() -> bool:
            # Rows of steps that are taken again are dropped by writing the file anew.
            return self.step() > (resumed if self._rows() != rows else max(highest, resumed))

        self.wait(f"going on after {fault}", going_on, timeout)
        resumed = self.resumptions()[-1]
        self.wait(f"step after {fault}", further, timeout)
        seconds = time.monotonic() - struck
        model = MODEL.findall(self.output())
        return Recovery(fault, highest, committed, resumed, seconds, float(model[-1]) if model else None)

    def _rows(self) -> int:
        """Which file metrics.jsonl is."""
        return (self.run / "metrics.jsonl").stat().st_ino
