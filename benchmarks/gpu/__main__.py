"""One GPU, ten minutes: how near the product's training comes to what the GPU can do, and what fits on it.

    python -m benchmarks.gpu [--part NAME …] [--minutes 9] [--to FILE] [--tiny]
    python -m benchmarks.gpu --join FILE … [--to FILE]

Gemma 3 4B, 12B and 27B as published, with random weights made on the GPU (nothing is downloaded), trained by the
product's own loop in one process, without Ray. Parts run one after the other, each in a process of its own with a time
limit, those of most worth first; tables come at the end, also of what was not measured and why. Ten minutes are too
few for all of them: `--join` makes one result of what several calls on one GPU wrote, and measures nothing. `--tiny`
runs all of it with hardly any weights, also on a CPU, to see that it works. README.md beside this file: which parts go
into which call, and what a bare machine needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.result import Result, read, recorded, text

#: Module → what pip calls it. Without these nothing of the product can be imported.
NEEDED = {
    "torch": "torch", "transformers": "transformers", "numpy": "numpy", "pyarrow": "pyarrow", "yaml": "pyyaml",
    "pydantic": "pydantic", "tenacity": "tenacity", "rich": "rich", "peft": "peft", "psutil": "psutil",
}  # fmt: skip
#: What some rows need.
OPTIONAL = ("bitsandbytes", "liger_kernel", "flash_attn", "triton")
STEPS = 3
MINUTES = 9.0
WHAT = (
    "Share of the GPU's own matrix products that training Gemma 3 reaches through the product's loop, random weights, "
    "one process, no Ray; what fits; what each thing brings"
)


def main() -> None:
    given = parsed(sys.argv[1:])
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"not installed: {' '.join(missing)}; benchmarks/gpu/README.md says how to bring packages along")
    if given.join:
        joined(given)
        return
    import torch

    from benchmarks.gpu import device as devices
    from benchmarks.gpu import running, tables

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.tiny:
        sys.exit("torch sees no GPU here: --tiny runs the same code with hardly any weights")
    driver = f", driver {devices.driver()}" if device == "cuda" else ""
    with recorded("gpu", WHAT, conditions(given), given) as result:
        rows = running.run(PARTS, given.part, given.minutes * 60, device, given.tiny, given.steps)
        gpu = next((row["about"]["gpu"] + driver for row in rows if "about" in row), "")
        result.machine = {**result.machine, "gpu": gpu}
        rows += [
            {"part": "packages", "name": name, "why": "not importable here: rows that need it say so"}
            for name in OPTIONAL
            if importlib.util.find_spec(name) is None
        ]
        tables.fill(result, [row for row in rows if "about" not in row])
    if any(row.get("why") == running.TOLD for row in rows):
        sys.exit(143)


def joined(given: argparse.Namespace) -> None:
    """One result of several: what one has of a part takes the place of what those before it have of it."""
    from benchmarks.gpu import tables

    results = [read(file) for file in given.join]
    gpus = {str(one.machine.get("gpu")) for one in results}
    if len(gpus) > 1:
        sys.exit(f"{' and '.join(map(str, given.join))} are of different GPUs: {' / '.join(sorted(gpus))}")
    by_part: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        for part in dict.fromkeys(row["part"] for row in one.raw):
            by_part[part] = [row for row in one.raw if row["part"] == part]
    last = results[-1]
    calls = "; ".join(f"{one.began}, commit {one.commit}" for one in results)
    whole = Result("gpu", WHAT, {**last.conditions, "calls": calls}, began=results[0].began, commit=last.commit)
    whole.machine, whole.seconds = last.machine, sum(one.seconds for one in results)
    whole.load = (results[0].load[0], last.load[-1])
    tables.fill(whole, [row for rows in by_part.values() for row in rows])
    print(text(whole))
    if given.to:
        whole.write(given.to)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME", help="which parts"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it; default: {MINUTES:g}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a case, timed at least; default: {STEPS}")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="results of calls, to be shown as one")
    parser.add_argument("--to", type=Path, help="file of the result; default: it is only printed")
    parser.add_argument("--tiny", action="store_true", help="hardly any weights; figures mean nothing")
    given = parser.parse_args(arguments)
    given.pairs = 0  # nothing is compared in pairs
    given.part = [name for name in PARTS if name in given.part]
    return given


def conditions(given: argparse.Namespace) -> dict[str, Any]:
    """What a reader has to know to judge the figures."""
    return {
        "data": "mock: random tokens, each a target, one document a row unless a row says otherwise",
        "weights": "random, bfloat16" + ("; TINY: the figures mean nothing" if given.tiny else ""),
        "threads": "as torch has them",
        "flops": (
            "6 for each trained weight and 4 for each frozen one, the tied embedding counted once, as the output "
            "projection; neither attention scores nor recomputation"
        ),
        "clipping": "at 1.0 where the update comes after the backward pass, none within it",
        "padding": "none",
        "allocator": (
            os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "PyTorch's default"
        ),
        "steps": (
            f"at least {given.steps} timed after 2"
            + ", and for 10 s (ablation: 3 s)" * (not given.tiny)
            + ", each waited for on the device; fewer where the time was over"
        ),
    }


if __name__ == "__main__":
    main()
