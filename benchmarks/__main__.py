"""Run benchmarks one after the other, and make docs/benchmarks.md again from their results.

    python -m benchmarks [NAME …]

Without names all that one machine without a GPU can run. Each runs in a process of its own, as `python -m
benchmarks.NAME --to benchmarks/results/NAME.json`. The machine has to be quiet: a load average above half a core before
one begins is said. The exit status is 1 where one of them failed; a missed aim is a figure, not a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import page
from benchmarks.result import RESULTS

#: In this order: the short ones first.
NAMES = ("packing", "checkpoint", "ingest", "trainer", "launcher", "recovery", "serve", "tune", "scale")


def main() -> None:
    names = sys.argv[1:] or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"there is no benchmark {', '.join(unknown)}: there are {', '.join(NAMES)}")
    failed = []
    for name in names:
        if (load := os.getloadavg()[0]) > 0.5:
            print(f"the load average is {load:.1f}: something else runs here, and is in the figures", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--to", str(RESULTS / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    page.write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
