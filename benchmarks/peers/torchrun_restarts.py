"""The peer of `recovery.py`: `torchrun --max-restarts`, followed by what its loop writes of its progress."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

LOOP = Path(__file__).parent / "torchrun_loop.py"
POLL = 0.05  # seconds
RESTARTS = 3


class Torchrun:
    """One run of the loop; `progress` is the file that its settings name.

    Args:
        settings: the loop's, as a file of JSON.
    """

    def __init__(self, settings: Path, progress: Path, workers: int) -> None:
        self._progress = progress
        progress.touch()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers)]
        command += ["--standalone", "--max-restarts", str(RESTARTS), str(LOOP), str(settings)]
        self._log = progress.with_suffix(".log").open("wb")
        self.began = time.monotonic()
        # Without the second, workers that are started again find the addresses of those before in torchrun's store
        # (of 2.13), cannot connect, and use the restarts up.
        settled = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env={**os.environ, **settled})

    def steps(self) -> list[int]:
        """The steps finished, those that were taken again as often as they were."""
        content = self._progress.read_text()
        return [int(line) for line in content[: content.rfind("\n") + 1].split()]

    def wait(self, what: str, condition: Callable[[], bool], timeout: float) -> float:
        """Wait until a condition holds. Returns when it did, by the monotonic clock.

        Raises:
            RuntimeError: the run ended before.
            TimeoutError: it did not in time.
        """
        end = time.monotonic() + timeout
        while not condition():
            log = Path(self._log.name)
            if self._process.poll() is not None:
                raise RuntimeError(f"torchrun ended before {what}:\n{log.read_text(errors='replace')[-4000:]}")
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} after {timeout:.0f} s:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(POLL)
        return time.monotonic()

    def workers(self) -> list[int]:
        """Process ids of the loop's processes."""
        return sorted(child.pid for child in psutil.Process(self._process.pid).children())

    def end(self) -> None:
        """End the run and its workers, wherever they are."""
        below = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._log.close()
