"""tokens/s through `ray-ft train` against the same model and rows in a plain torchrun FSDP2 loop.

    python benchmarks/launcher.py [--pairs 8] [--steps 40]

Real data (the demo), two workers, float32 on CPU, one thread each, clipping at 1.0, no evaluation and no checkpoint
within the timed steps. Both count real tokens only. Rates are over the steps after the first `WARMUP`; the seconds from
the command to the first step are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ray_ft import demo, recipe
from ray_ft.data import pack, stream
from ray_ft.data.order import Order
from ray_ft.train.launch import prepare_job
from ray_ft.train.metrics import read_metrics
from ray_ft.view import View

HERE = Path(__file__).parent
WARMUP = 10  # steps before the clock counts: allocators and caches settle
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch:
        made = demo.write_demo(os.path.join(scratch, "demo"))
        pairs = []
        for number in range(options.pairs):
            ours = _ray_ft(made, scratch, options.steps, number)
            theirs = _torchrun(made, scratch, options.steps)
            worst = max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            pairs.append({"ray_ft": ours, "torchrun": theirs, "loss_difference": worst})
            print(
                f"pair {number + 1}: ray-ft {ours['rate']:,.0f} tokens/s, torchrun {theirs['rate']:,.0f}, ratio "
                f"{ours['rate'] / theirs['rate']:.3f}; first step {ours['first']:.1f} s, {theirs['first']:.1f} s; "
                f"losses differ by at most {worst:.1e}",
                flush=True,
            )
    _summarise(pairs)


def _summarise(pairs: list[dict[str, Any]]) -> None:
    ratios = sorted(pair["ray_ft"]["rate"] / pair["torchrun"]["rate"] for pair in pairs)
    extra = sorted(pair["ray_ft"]["first"] - pair["torchrun"]["first"] for pair in pairs)
    import ray
    import torch
    import transformers

    print(f"tokens/s ray-ft ÷ torchrun: median {statistics.median(ratios):.3f} ({ratios[0]:.3f} … {ratios[-1]:.3f})")
    middle = statistics.median(extra)
    print(f"seconds to the first step, ray-ft − torchrun: median {middle:.1f} ({extra[0]:.1f} … {extra[-1]:.1f})")
    print(
        f"{len(pairs)} pairs; {WORKERS} workers × 1 thread on {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"ray {ray.__version__}; real data, clipping 1.0"
    )


def _settings(made: demo.DemoPaths, scratch: str, steps: int, name: str) -> recipe.Recipe:
    source = {"path": list(made.train), "format": "translation", "prompt": demo.PROMPT}
    return recipe.parse(
        {
            "run": {"name": name, "storage": os.path.join(scratch, "runs")},
            "model": {"path": made.base},
            "data": {"train": [source], "seq_len": 256},
            "train": {
                "workers": WORKERS,
                "global_batch": 16,
                "micro_batch": 8,
                "max_steps": steps,
                "optimizer": {"lr": 4e-3},
                "schedule": {"name": "constant"},
                "log_every": 1,
                "checkpoint": {"every": steps},
            },
        }
    )


def _ray_ft(made: demo.DemoPaths, scratch: str, steps: int, number: int) -> dict[str, Any]:
    settings = _settings(made, scratch, steps, f"pair-{number}")
    path = os.path.join(scratch, "recipe.yaml")
    Path(path).write_text(settings.to_yaml())
    # Rows are prepared before either is timed, so that both start from packed rows.
    job = prepare_job(settings, View(), stream.in_process)
    began = time.time()
    process = subprocess.Popen([sys.executable, "-m", "ray_ft", "train", path], stdout=subprocess.DEVNULL)
    first = 0.0
    while process.poll() is None:
        if not first and read_metrics(settings.run.dir):
            first = time.time() - began
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"ray-ft train exited with {process.returncode}")
    rows = read_metrics(settings.run.dir)
    tokens = _real_tokens(job.order, settings, steps)
    seconds = [row["step_seconds"] for row in rows]
    return {
        "rate": sum(tokens[WARMUP:]) / sum(seconds[WARMUP:]),
        "first": first,
        "losses": [row["loss"] for row in rows],
    }


def _torchrun(made: demo.DemoPaths, scratch: str, steps: int) -> dict[str, Any]:
    settings = _settings(made, scratch, steps, "torchrun")
    job = prepare_job(settings, View(), stream.in_process)
    batches = list(stream.local_batches(job.order, 0, steps * 16, 0, 1, 16))
    ids = np.concatenate([batch.rows.input_ids for batch in batches]).astype(np.int64)
    flags = np.concatenate([batch.rows.flags for batch in batches])
    rows = os.path.join(scratch, "rows.npz")
    np.savez(rows, input_ids=ids, position_ids=pack.position_ids(flags), labels=pack.labels(ids, flags))
    result, config = os.path.join(scratch, "result.json"), os.path.join(scratch, "settings.json")
    Path(config).write_text(
        json.dumps(
            {
                "rows": rows,
                "model": made.base,
                "threads": 1,
                "global_batch": 16,
                "steps": steps,
                "lr": 4e-3,
                "result": result,
            }
        )
    )
    began = time.time()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(WORKERS),
            str(HERE / "torchrun_loop.py"),
            config,
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    found = json.loads(Path(result).read_text())
    total = time.time() - began
    tokens = _real_tokens(job.order, settings, steps)
    return {
        "rate": sum(tokens[WARMUP:]) / sum(found["step_seconds"][WARMUP:]),
        "first": total - sum(found["step_seconds"][1:]),
        "losses": found["losses"],
    }


def _real_tokens(order: Order, settings: recipe.Recipe, steps: int) -> list[int]:
    size = settings.train.global_batch
    return [
        int(np.count_nonzero(batch.rows.flags & pack.REAL))
        for batch in stream.local_batches(order, 0, steps * size, 0, 1, size)
    ]


if __name__ == "__main__":
    main()
