"""`ray-ft train` against the same model and rows in a plain torchrun FSDP2 loop: tokens/s, seconds to the first step.

    python -m benchmarks.launcher [--pairs 8] [--steps 40] [--to FILE]

Two workers, float32, no evaluation and no checkpoint within the timed steps. Both count real tokens only. Rates are
over the steps after the first `WARMUP`, of a run of ours that is told to end then, long before its rows do: Ray Data is
at work as in any run. The first step is timed from the command on: "cold" starts a Ray of its own for the run, "warm"
joins one that stands, as on a cluster. Rows are prepared before any of them is timed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import PAIRS, differences, interleaved, ratios
from benchmarks.result import Figure, options, recorded
from ray_ft import demo, recipe, session
from ray_ft.data import pack, stream
from ray_ft.data.order import Order
from ray_ft.train.launch import prepare_job
from ray_ft.train.metrics import read_metrics
from ray_ft.view import View

PEERS = Path(__file__).parent / "peers"
WARMUP = 10  # steps before the clock counts: allocators and caches settle
WORKERS = 2
BATCH = 16  # rows in a step
LR = 4e-3
EPOCHS = 40  # of ours, some four thousand steps
CONDITIONS = {
    "data": "the demo's rows, packed to 256 tokens before the clock starts",
    "threads": "1 for each of 2 workers",
    "flops": "none counted",
    "clipping": "1.0, both",
    "padding": "not counted",
}


def main() -> None:
    parser = options(__doc__, PAIRS)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    about = "A: ray-ft train (Ray Train workers fed by Ray Data). B: the same model and rows in a plain torchrun loop."
    with (
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
        recorded("launcher", about, CONDITIONS, given) as result,
    ):
        made = demo.write_demo(os.path.join(scratch, "demo"))
        before = dict(os.environ)
        with session.ray_running("", session.OBJECT_STORE_BYTES):
            import ray

            address = ray.get_runtime_context().gcs_address
            arms = {
                "cold": partial(_ray_ft, made, scratch, given.steps, before),
                "torchrun": partial(_torchrun, made, scratch, given.steps, before),
                "warm": partial(_ray_ft, made, scratch, given.steps, {**os.environ, "RAY_ADDRESS": address}),
                "ray train": partial(_ray_train, made, scratch, given.steps, before),
            }
            pairs = interleaved(arms, given.pairs, warm_up=1, show=_line)
        worst = [
            max(abs(a - b) / b for a, b in zip(pair["cold"]["losses"], pair["torchrun"]["losses"], strict=True))
            for pair in pairs
        ]
        result.figures += [
            Figure("tokens/s, ray-ft ÷ torchrun", ratios(pairs, "cold", "torchrun", "rate"), at_least=0.97),
            Figure("the same on a Ray that stands", ratios(pairs, "warm", "torchrun", "rate"), at_least=0.97),
            _seconds("first step, ray-ft − torchrun, cold", differences(pairs, "cold", "torchrun", "first"), 8),
            _seconds("first step, ray-ft − torchrun, warm", differences(pairs, "warm", "torchrun", "first"), 2),
            _seconds("first step, ray-ft − Ray Train alone, cold", differences(pairs, "cold", "ray train", "first")),
            Figure("tokens/s, Ray Train alone ÷ torchrun", ratios(pairs, "ray train", "torchrun", "rate")),
            _seconds("first step, torchrun", [pair["torchrun"]["first"] for pair in pairs]),
            Figure("largest relative difference of a step's loss", worst, form="{:.1e}"),
        ]
        result.raw = pairs


def _seconds(name: str, values: list[float], at_most: float | None = None) -> Figure:
    return Figure(name, values, unit="s", at_most=at_most, form="{:.1f}")


def _line(pair: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {one['rate']:,.0f} tokens/s, first {one['first']:.1f} s" for name, one in pair.items())


def _settings(made: demo.DemoPaths, scratch: str, steps: int | None, name: str) -> recipe.Recipe:
    source = {"path": list(made.train), "format": "translation", "prompt": demo.PROMPT}
    return recipe.parse(
        {
            "run": {"name": name, "storage": os.path.join(scratch, "runs")},
            "model": {"path": made.base},
            "data": {"train": [source], "seq_len": 256},
            "train": {
                "workers": WORKERS,
                "global_batch": BATCH,
                "micro_batch": 8,
                "max_steps": steps,
                "epochs": EPOCHS,
                "optimizer": {"lr": LR},
                "schedule": {"name": "constant"},
                "log_every": 1,
                "checkpoint": {"every": 1_000_000},
            },
        }
    )


def _ray_ft(made: demo.DemoPaths, scratch: str, steps: int, env: Mapping[str, str], number: int) -> dict[str, Any]:
    where = "warm" if env.get("RAY_ADDRESS") else "cold"
    settings = _settings(made, scratch, None, f"{where}-{number + 1}")
    path = os.path.join(scratch, "recipe.yaml")
    Path(path).write_text(settings.to_yaml())
    # Rows are prepared before either is timed, so that both start from packed rows.
    job = prepare_job(settings, View(), stream.in_process)
    began = time.time()
    process = subprocess.Popen([sys.executable, "-m", "ray_ft", "train", path], stdout=subprocess.DEVNULL, env=env)
    first, rows = 0.0, list[dict[str, float]]()
    while process.poll() is None and len(rows) < steps:
        rows = read_metrics(settings.run.dir)
        if rows and not first:
            first = time.time() - began
        time.sleep(0.05 if not first else 0.5)
    process.terminate()
    if (status := process.wait()) != 128 + signal.SIGTERM:
        sys.exit(f"ray-ft train exited with {status}")
    rows = rows[:steps]
    tokens = _real_tokens(job.order, settings, steps)
    seconds = [row["step_seconds"] for row in rows]
    return {
        "rate": sum(tokens[WARMUP:]) / sum(seconds[WARMUP:]),
        "first": first,
        "losses": [row["loss"] for row in rows],
    }


def _torchrun(made: demo.DemoPaths, scratch: str, steps: int, env: Mapping[str, str], _: int) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS), str(PEERS / "torchrun_loop.py")]
    return _plain(made, scratch, steps, {**env, "OMP_NUM_THREADS": "1"}, torchrun)


def _ray_train(made: demo.DemoPaths, scratch: str, steps: int, env: Mapping[str, str], _: int) -> dict[str, Any]:
    return _plain(made, scratch, steps, env, [str(PEERS / "ray_train_loop.py")])


def _plain(
    made: demo.DemoPaths, scratch: str, steps: int, env: Mapping[str, str], program: list[str]
) -> dict[str, Any]:
    settings = _settings(made, scratch, steps, "plain")
    job = prepare_job(settings, View(), stream.in_process)
    batches = list(stream.local_batches(job.order, 0, steps * BATCH, 0, 1, BATCH))
    ids = np.concatenate([batch.rows.input_ids for batch in batches]).astype(np.int64)
    flags = np.concatenate([batch.rows.flags for batch in batches])
    rows, result, config = (os.path.join(scratch, name) for name in ("rows.npz", "result.json", "settings.json"))
    np.savez(rows, input_ids=ids, position_ids=pack.position_ids(flags), labels=pack.labels(ids, flags))
    content = {"rows": rows, "model": made.base, "threads": 1, "global_batch": BATCH, "steps": steps, "lr": LR}
    Path(config).write_text(json.dumps({**content, "result": result}))
    began = time.time()
    done = subprocess.run([sys.executable, *program, config], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(program)} exited with {done.returncode}\n{done.stderr[-3000:]}")
    found = json.loads(Path(result).read_text())
    tokens = _real_tokens(job.order, settings, steps)
    return {
        "rate": sum(tokens[WARMUP:]) / sum(found["step_seconds"][WARMUP:]),
        "first": found["first_step_at"] - began,
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
