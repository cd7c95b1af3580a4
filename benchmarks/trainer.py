"""Training speed beside TRL's SFTTrainer with packing: the same base, raw rows, batch, optimizer and threads.

    python -m benchmarks.trainer [--pairs 8] [--rows 4000] [--to FILE]

ray-ft as `ray-ft train` with `train.workers: 0`: one process and no Ray, as TRL's is; what Ray Train and Ray Data cost
is what `benchmarks.launcher` measures. TRL as its users write it (`peers/trl_sft.py`). Both take raw rows, render,
pack and train each of them once, so that both have seen the same tokens at the end; then one function says the
held-out loss of both models. How many rows share a forward pass changes nothing that is computed, but TRL makes one
long row of them, for which a CPU has no attention that skips what the mask forbids. So each side first shows its speed
with every micro-batch, and then competes with its fastest. Limits: one model of a million parameters and short rows,
on a CPU; nothing here tells how both do on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import heldout
from benchmarks.pairs import interleaved, ratios, spread
from benchmarks.peers import packages
from benchmarks.result import Figure, Table, options, recorded
from ray_ft import demo, recipe
from ray_ft.data import pack, stream
from ray_ft.data.order import Order
from ray_ft.train.launch import prepare_job
from ray_ft.train.metrics import read_metrics
from ray_ft.trained import Trained
from ray_ft.view import View

PEER = Path(__file__).parent / "peers" / "trl_sft.py"
ROWS = 4_000  # 66 steps
WARM_UP = 10  # steps before the clock counts: allocators and caches settle
GLOBAL_BATCH, SEQ_LEN = 8, 256
LR = 1e-3  # a quarter of the quickstart's: where the loss falls fast, it tells the order of rows and not the trainer
MICRO_BATCHES = (1, 2, 4, 8)
SCANNED_STEPS, SCANNED_WARM_UP = 16, 4  # of the runs that look for the fastest micro-batch
THREADS = 2
OURS, THEIRS = "ray-ft", "TRL"


@dataclass(frozen=True)
class Setting:
    """One comparison: where it happens, and what both sides are told alike; `steps` 0: every row once."""

    made: demo.DemoPaths
    scratch: str
    threads: int = THREADS
    steps: int = 0

    def recipe(self, micro_batch: int, seed: int, name: str) -> recipe.Recipe:
        source = {"path": list(self.made.train), "format": "translation", "prompt": demo.PROMPT}
        train: dict[str, Any] = {
            "workers": 0,
            "device": "cpu",
            "global_batch": GLOBAL_BATCH,
            "micro_batch": micro_batch,
            "optimizer": {"lr": LR},
            "schedule": {"name": "constant"},
            "log_every": 1,
            "checkpoint": {"every": 1_000_000},  # the last step is saved, outside of what is timed
        }
        if self.steps:
            train["max_steps"] = self.steps
        return recipe.parse(
            {
                "run": {"name": name, "storage": os.path.join(self.scratch, "runs"), "seed": seed},
                "model": {"path": self.made.base},
                "data": {"train": [source], "seq_len": SEQ_LEN},
                "train": train,
            }
        )

    def for_trl(self, settings: recipe.Recipe, output: str) -> dict[str, Any]:
        """What the recipe says, for the peer."""
        optimizer = settings.train.optimizer
        return {
            "files": list(self.made.train),
            "prompt": demo.PROMPT,
            "languages": demo.LANGUAGES,
            "model": settings.model.path,
            "threads": self.threads,
            "seq_len": settings.data.seq_len,
            "global_batch": settings.train.global_batch,
            "micro_batch": settings.train.micro_batch,
            "steps": self.steps,
            "lr": optimizer.lr,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "clip_norm": settings.train.clip_norm,
            "seed": settings.run.seed,
            "output": output,
            "result": os.path.join(output, "result.json"),
            "save": not self.steps,
        }


# -------------------------------------------------------------------------------------------------------- two sides


def ours(setting: Setting, micro_batch: int, seed: int) -> dict[str, Any]:
    """One run of `ray-ft train`: see `found`, and `run`, its directory."""
    name = f"{OURS}-{seed}-{micro_batch}-{setting.steps}"
    settings = setting.recipe(micro_batch, seed, name)
    file = os.path.join(setting.scratch, f"{name}.yaml")
    Path(file).write_text(settings.to_yaml(), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    began = time.time()
    command = [sys.executable, "-m", "ray_ft", "train", file]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    took = time.time() - began
    rows = read_metrics(settings.run.dir)
    job = prepare_job(settings, View(Console(quiet=True)), stream.in_process)  # found prepared
    tokens, targets = counted(job.order, len(rows))
    seconds = [row["step_seconds"] for row in rows]
    more = {"documents": job.train.counts.used, "packed_rows": job.train.counts.packed, "run": settings.run.dir.root}
    return found(setting, tokens, targets, seconds, took) | more


def theirs(setting: Setting, micro_batch: int, seed: int) -> dict[str, Any]:
    """The same by the peer; `run` is the folder of its model."""
    output = os.path.join(setting.scratch, f"{THEIRS}-{seed}-{micro_batch}-{setting.steps}")
    os.makedirs(output, exist_ok=True)
    given = setting.for_trl(setting.recipe(micro_batch, seed, "unused"), output)
    file = os.path.join(output, "settings.json")
    Path(file).write_text(json.dumps(given), encoding="utf-8")
    began = time.time()
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [sys.executable, str(PEER), file],
            env={**packages.environment(setting.threads), "HF_DATASETS_CACHE": os.path.join(output, "cache")},
            stdout=said,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            said.seek(0)
            sys.exit(f"{PEER.name} exited with {done.returncode}: {said.read()[-3000:]}")
    took = time.time() - began
    result = json.loads(Path(given["result"]).read_text(encoding="utf-8"))
    more = {name: result[name] for name in ("documents", "packed_rows", "attention", "optimizer")} | {"run": output}
    return found(setting, result["tokens"], result["targets"], result["step_seconds"], took) | more


def found(
    setting: Setting, tokens: Sequence[int], targets: Sequence[int], seconds: Sequence[float], took: float
) -> dict[str, Any]:
    """Rates over the steps after warm-up, per second: of tokens that are no padding, and of those with a loss.

    Args:
        tokens, targets, seconds: of each step.
        took: seconds of the whole command.

    Raises:
        ValueError: a step without its time, or too few steps.
    """
    warm_up = SCANNED_WARM_UP if setting.steps else WARM_UP
    if not len(tokens) == len(targets) == len(seconds) or len(seconds) <= warm_up:
        raise ValueError(f"{len(tokens)} and {len(targets)} counts, {len(seconds)} times, {warm_up} steps of warm-up")
    measured = sum(seconds[warm_up:])
    return {
        "rate": sum(tokens[warm_up:]) / measured,
        "trained_rate": sum(targets[warm_up:]) / measured,
        "step": measured / len(seconds[warm_up:]),
        "tokens": sum(tokens),
        "targets": sum(targets),
        "steps": len(seconds),
        "beside": took - sum(seconds),
    }


def counted(order: Order, steps: int) -> tuple[list[int], list[int]]:
    """Tokens that are no padding, and targets, of each of the first steps."""
    tokens, targets = [], []
    for batch in stream.local_batches(order, 0, steps * GLOBAL_BATCH, 0, 1, GLOBAL_BATCH):
        tokens.append(int(np.count_nonzero(batch.rows.flags & pack.REAL)))
        targets.append(int(np.count_nonzero(batch.rows.flags & pack.TRAINED)))
    return tokens, targets


def check_alike(pair: Mapping[str, Mapping[str, Any]]) -> None:
    """Both trained the same documents to the last token.

    Raises:
        ValueError: they did not, and nothing of the pair can be compared.
    """
    for key in ("documents", "tokens"):
        if len({arm[key] for arm in pair.values()}) > 1:
            raise ValueError(f"the arms trained on different {key}: { {name: arm[key] for name, arm in pair.items()} }")


def loss_of(name: str, arm: Mapping[str, Any], base: str, rows: Sequence[Mapping[str, str]]) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == OURS:
        model = Trained.of(arm["run"]).model(torch.device("cpu"), torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(arm["run"], dtype=torch.float32).eval()
    return heldout.loss(model, AutoTokenizer.from_pretrained(base), rows)


# ---------------------------------------------------------------------------------------------------------- the whole


SIDES = {OURS: ours, THEIRS: theirs}


def scanned(setting: Setting) -> dict[str, dict[int, float]]:
    """Tokens/s of each side with each micro-batch, from one short run each."""
    return {name: {micro: side(setting, micro, 0)["rate"] for micro in MICRO_BATCHES} for name, side in SIDES.items()}


def conditions(given: argparse.Namespace) -> dict[str, str]:
    return {
        "data": f"{given.rows:,} raw rows of the demo (number words), each once, in rows of {SEQ_LEN} tokens, "
        "the pair's number as seed of their order",
        "threads": f"{given.threads} in one process on each side",
        "flops": "not counted: tokens that are no padding, and of these the targets, by the seconds of all steps after "
        f"the first {WARM_UP}",
        "clipping": "global norm 1.0 on both sides",
        "padding": "not counted; TRL's rows have none, ray-ft's share of it is in the table",
        "training": f"float32, sdpa, Gemma 3 of {given.layers} layers and width {given.hidden_size}, batches of "
        f"{GLOBAL_BATCH} rows, fused AdamW, betas 0.9 and 0.95, eps 1e-8, no decay, constant {LR:g}; "
        "every step logged, nothing evaluated or saved while the clock runs",
        "ray-ft": "train.workers: 0",
        "TRL": "SFTTrainer, packing bfd, completion_only_loss, no gradient checkpointing; its targets have the line "
        "break behind an answer besides",
    }


def main() -> None:
    parser = options(__doc__, pairs=8)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=THREADS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    compared = "training steps of ray-ft (A) and of TRL's SFTTrainer with packing (B)"
    with (
        recorded("trainer", compared, conditions(given), given, peers=[packages.folder()]) as result,
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
    ):
        made = demo.write_demo(
            os.path.join(scratch, "demo"), rows=given.rows, hidden_size=given.hidden_size, layers=given.layers
        )
        scan = scanned(Setting(made, scratch, given.threads, SCANNED_STEPS))
        best = {name: max(rates, key=rates.__getitem__) for name, rates in scan.items()}
        setting = Setting(made, scratch, given.threads)
        rows = _held_out(made)

        def arm(name: str) -> Any:
            def run(number: int) -> dict[str, Any]:
                one = SIDES[name](setting, best[name], number)
                return one | {"loss": loss_of(name, one, made.base, rows)}

            return run

        pairs = interleaved({name: arm(name) for name in SIDES}, given.pairs, warm_up=0, show=_line)
        result.figures = figures(pairs)
        result.tables = tables(pairs, scan, best)
        result.raw = {"pairs": pairs, "scan": scan, "micro_batch": best}


def _held_out(made: demo.DemoPaths) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    return pq.read_table(made.heldout).to_pylist()


def _line(pair: dict[str, Any]) -> str:
    check_alike(pair)
    one, other = pair[OURS], pair[THEIRS]
    return (
        f"{one['rate']:,.0f} and {other['rate']:,.0f} tokens/s, ratio {one['rate'] / other['rate']:.3f}; "
        f"held-out loss {one['loss']:.4f} and {other['loss']:.4f}"
    )


def figures(pairs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [
        Figure("tokens/s without padding, ray-ft ÷ TRL", ratios(pairs, OURS, THEIRS, "rate"), at_least=1.2),
        Figure("trained tokens/s, ray-ft ÷ TRL", ratios(pairs, OURS, THEIRS, "trained_rate")),
        Figure("held-out loss after the same tokens, ray-ft ÷ TRL", ratios(pairs, OURS, THEIRS, "loss"), at_most=1.05),
    ]


def tables(
    pairs: Sequence[Mapping[str, Any]], scan: Mapping[str, Mapping[int, float]], best: Mapping[str, int]
) -> list[Table]:
    def each(key: str, form: str) -> list[str]:
        return [spread([pair[name][key] for pair in pairs], form) for name in SIDES]

    one = pairs[0]
    rows = [
        ["tokens/s without padding", *each("rate", "{:,.0f}")],
        ["trained tokens/s", *each("trained_rate", "{:,.0f}")],
        ["seconds a step", *each("step", "{:.3f}")],
        ["steps", *(one[name]["steps"] for name in SIDES)],
        ["packed rows", *(one[name]["packed_rows"] for name in SIDES)],
        ["share that is no padding", *(f"{_filled(one[name]):.4f}" for name in SIDES)],
        ["rows in a forward pass", *(best[name] for name in SIDES)],
        ["seconds of the command beside its steps", *each("beside", "{:.1f}")],
        ["held-out loss", *each("loss", "{:.4f}")],
    ]
    micros = [[micro, *(f"{scan[name][micro]:,.0f}" for name in SIDES)] for micro in MICRO_BATCHES]
    ratio = [f"{scan[OURS][micro] / scan[THEIRS][micro]:.2f}" for micro in MICRO_BATCHES]
    return [
        Table("both sides", ["", *SIDES], rows),
        Table(
            "tokens/s by rows in a forward pass, from a short run each",
            ["rows", *SIDES, "ray-ft ÷ TRL"],
            [[*row, more] for row, more in zip(micros, ratio, strict=True)],
        ),
    ]


def _filled(arm: Mapping[str, Any]) -> float:
    """Of the places in packed rows, were all of them as wide as a row may be."""
    return arm["tokens"] / (arm["packed_rows"] * SEQ_LEN)


if __name__ == "__main__":
    main()
