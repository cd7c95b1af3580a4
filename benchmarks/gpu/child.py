"""One part in this process: `python -m benchmarks.gpu.child NAME ROWS LIMIT DEVICE STEPS [small]`.

Rows go to the file ROWS, each a line of JSON as soon as it is there: the process may be ended at any moment.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Setting


def main(arguments: list[str]) -> None:
    began = time.monotonic()
    name, rows, limit, device, steps, *more = arguments
    part, small = PARTS[name], more == ["small"]
    with Path(rows).open("a", encoding="utf-8") as out, tempfile.TemporaryDirectory(prefix="ray_ft_gpu_") as scratch:

        def emit(row: dict[str, Any]) -> None:
            out.write(json.dumps({"part": name, **row}) + "\n")
            out.flush()

        where = {"cuda": "cuda:0"}.get(device, device) if part.gpu else "cpu"
        if part.gpu:
            import torch

            from benchmarks.gpu.device import described

            emit({"about": described(torch.device(where))})
        seconds = 0.0 if small else part.seconds
        part.measure(Setting(where, small, int(steps), began + float(limit), Path(scratch), emit, seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
