"""A process that prepares data as a driver does: chunks are worked on in others, as Ray Data would do it elsewhere.

So its memory is the driver's alone. It is started once (`Driver`), asked by lines of JSON, and warm before it is asked.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PROCESSES = 2  # that work on chunks


class Driver:
    """The process, from within another one."""

    def __enter__(self) -> Driver:
        command = [sys.executable, "-m", "benchmarks.scale.driver"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def prepare(self, scratch: Path, base: str, repeat: int) -> dict[str, Any]:
        """Prepare the rows in `scratch`/files: seconds, those to find them prepared again (`repeat` times), MiB of
        memory, rows.

        Raises:
            RuntimeError: it died; what it said stands on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(scratch), base, repeat]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the driver ended with {self._process.wait()} before it had prepared {scratch}")


def serve() -> None:
    """Prepare what each line of stdin names."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:

        def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
            return pool.map(_apply, ((function, item) for item in items), chunksize=1)

        base: float | None = None
        for line in sys.stdin:
            scratch, model, repeat = json.loads(line)
            if base is None:
                _warm(Path(scratch), model, spread)
                base = _status("VmRSS")
            print(json.dumps(_prepared(Path(scratch), model, spread, base, repeat)), flush=True)


def _warm(scratch: Path, model: str, spread: Any) -> None:
    """Imports and tokenizers, in all processes."""
    from benchmarks.scale.files import settings, write_rows
    from ray_ft.data import prepare

    write_rows(scratch / "few", 4 * PROCESSES, 400)
    prepare.prepare(settings(scratch / "warm", model, str(scratch / "few")), "train", model, spread)


def _prepared(scratch: Path, model: str, spread: Any, base: float, repeat: int) -> dict[str, Any]:
    from benchmarks.scale.files import settings
    from benchmarks.scale.growth import timed
    from ray_ft.data import prepare, stream

    one = settings(scratch, model, str(scratch / "files"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is noted anew
    began = time.perf_counter()
    made = prepare.prepare(one, "train", model, spread)
    seconds, peak = time.perf_counter() - began, _status("VmHWM")
    again = [timed(lambda: prepare.prepare(one, "train", model, stream.in_process)) for _ in range(repeat)]
    return {"seconds": seconds, "again": again, "mib": max(peak - base, 0.01), "rows": made.counts.used}


def _apply(pair: tuple[Callable[[Any], Any], Any]) -> Any:
    function, item = pair
    return function(item)


def _status(name: str) -> float:
    """MiB that the kernel says of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {name}: this needs Linux"
    return int(found[1]) / 1024


if __name__ == "__main__":
    serve()
