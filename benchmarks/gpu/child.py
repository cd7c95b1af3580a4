"""One part in this process: `python -m benchmarks.gpu.child NAME ROWS SECONDS DEVICE STEPS [small]`.

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
    name, rows, seconds, device, steps, *more = arguments
    part = PARTS[name]
    with Path(rows).open("a", encoding="utf-8") as out, tempfile.TemporaryDirectory(prefix="ray_ft_gpu_") as scratch:

        def emit(row: dict[str, Any]) -> None:
            out.write(json.dumps({"part": name, **row}) + "\n")
            out.flush()

        where = {"cuda": "cuda:0"}.get(device, device) if part.gpu else "cpu"
        if part.gpu:
            import torch

            from benchmarks.gpu.device import described

            emit({"about": described(torch.device(where))})
        part.function(Setting(where, more == ["small"], int(steps), began + float(seconds), Path(scratch), emit))


if __name__ == "__main__":
    main(sys.argv[1:])
