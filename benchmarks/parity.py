"""Every way of training gives one result: a table of differences, made by training.

    python -m benchmarks.parity [--steps 20] [--quick] [--out FOLDER]

First table: {fsdp, zero3, none} × {1, 2 workers} × {full, LoRA} × {accumulation 1, 4}, in float32 and bfloat16, each
against a plain loop in one process that shares only the packed rows: transformers' model, peft's adapter, torch's
AdamW, all logits at once, float32. Compared are the losses of each step and the final weights.

Further tables: a checkpoint written under each of {fsdp, zero3} × {1, 2, 4 workers} in mid-run, restored under each
other; training goes on to the end and has to give the losses and weights of a run that nobody interrupted.

Workers are processes joined by gloo, one thread each, without Ray: what is compared is what a step computes. Exits
with 1 if a difference is over its limit: 1e-4 in float32, 1e-2 in bfloat16, relative. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from ray_ft import recipe as recipes
from ray_ft.data import pack, stream
from ray_ft.data.order import Order
from ray_ft.demo import PROMPT, write_demo
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout, Strategy
from ray_ft.train import checkpoint, launch, worker
from ray_ft.train.loop import train_step
from ray_ft.train.schedule import learning_rate
from ray_ft.view import View

LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 16


@dataclass(frozen=True)
class Cell:
    """One way of training."""

    strategy: str
    workers: int
    tuning: str  # full | lora
    accumulation: int
    dtype: str

    def overrides(self) -> list[str]:
        return [
            f"train.strategy={self.strategy}",
            f"train.workers={self.workers}",
            f"train.micro_batch={BATCH // (self.workers * self.accumulation)}",
            f"model.adapter={ADAPTERS[self.tuning]}",
        ]


ADAPTERS = {"full": "null", "lora": "{name: lora, rank: 4}"}


@dataclass(frozen=True)
class Result:
    """Losses by step, and trained weights by name."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------------ the ways


def recipe_of(folder: str, steps: int, *overrides: str) -> Recipe:
    rows = {"format": "translation", "prompt": PROMPT}
    content: dict[str, Any] = {
        "run": {"name": "parity", "storage": f"{folder}/runs"},
        "model": {"path": f"{folder}/demo/base"},
        "data": {"train": [{"path": f"{folder}/demo/train", **rows}], "seq_len": 128},
        "train": {
            "device": "cpu",
            "global_batch": BATCH,
            "max_steps": steps,
            "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
            "schedule": {"warmup_steps": 4},
        },
    }
    for override in overrides:
        recipes.apply_override(content, override)
    return recipes.parse(content)


def steps_of(recipe: Recipe, strategy: Strategy, order: Order, start: int, stop: int, total: int) -> list[float]:
    """Take steps [start, stop) of the run. Returns their losses."""
    layout, settings = strategy.layout, recipe.train
    rows, share = settings.global_batch, settings.rows_per_worker
    batches = stream.local_batches(order, start * rows, stop * rows, layout.rank, layout.world, share)
    losses = []
    for step, batch in enumerate(batches, start):
        lr = learning_rate(settings.schedule, settings.optimizer.lr, step, total)
        losses.append(train_step(strategy, batch, settings, lr).loss)
    return losses


def whole_weights(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Trained weights, put together from all workers' runs."""
    trained = strategy.moments()
    found = {}
    for name, span in strategy.spans().items():
        if name in trained:
            whole = torch.zeros(span.numel)
            if span.owner:
                whole[span.start : span.stop] = span.data.float()
            found[name] = strategy.all_reduce(whole).view(span.shape)
    return found


def run_cell(cell: Cell, folder: str, job: worker.Job, steps: int, rank: int) -> Result:
    recipe = recipe_of(folder, steps, *cell.overrides())
    layout = Layout(rank, cell.workers, torch.device("cpu"), DTYPES[cell.dtype])
    strategy = worker.build(recipe, layout).strategy
    losses = steps_of(recipe, strategy, job.order, 0, steps, steps)
    return Result(losses, whole_weights(strategy))


# -------------------------------------------------------------------------------------------------- the reference


def reference(recipe: Recipe, job: worker.Job, steps: int) -> Result:
    """The same steps as a plain loop, in float32 on one process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32, attn_implementation="sdpa")
    if recipe.model.adapter:
        model = with_adapter(model, recipe)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = [p for name, p in trained.items() if p.dim() < 2 or "embed_tokens" in name]
    deep = [p for name, p in trained.items() if not (p.dim() < 2 or "embed_tokens" in name)]
    settings = recipe.train.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": deep, "weight_decay": settings.weight_decay}, {"params": flat, "weight_decay": 0.0}],
        betas=settings.betas,
        eps=settings.eps,
    )
    losses = []
    for step, batch in enumerate(stream.local_batches(job.order, 0, steps * BATCH, 0, 1, BATCH)):
        ids = torch.from_numpy(batch.rows.input_ids.astype(np.int64))
        positions = torch.from_numpy(pack.position_ids(batch.rows.flags))
        labels = torch.from_numpy(pack.labels(batch.rows.input_ids, batch.rows.flags))
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), recipe.train.clip_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.train.schedule, settings.lr, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Result(losses, {name: p.detach().clone() for name, p in trained.items()})


def with_adapter(model: Any, recipe: Recipe) -> Any:
    """peft's own adapter on every linear layer, with the values that ours begins with."""
    from peft import LoraConfig, inject_adapter_in_model

    ours = worker.build(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"strategy": "none"})}),
        Layout(0, 1, torch.device("cpu"), torch.float32),
    ).strategy
    start = {name: span.data.view(span.shape) for name, span in ours.spans().items() if ".lora_" in name}
    settings = recipe.model.adapter
    assert settings is not None
    targets = sorted({name.split(".lora_")[0].split(".")[-1] for name in start})
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    model = inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data.copy_(start[name])
    return model


# ------------------------------------------------------------------------------------------------------ processes


def spawn(world: int, folder: str, function: str, tasks: list[Any], job: worker.Job, steps: int) -> list[Any]:
    """Run `function(task, …)` for each task in turn on `world` processes. Returns what rank 0 got."""
    out = Path(folder, f"answer-{os.getpid()}-{time.monotonic_ns()}.pt")
    store = f"{out}.store"
    mp.spawn(_process, (world, store, str(out), function, tasks, folder, job, steps), nprocs=world)
    return torch.load(out, weights_only=False)  # our own file, written just now


def _process(
    rank: int, world: int, store: str, out: str, function: str, tasks: list[Any], folder: str, job: Any, steps: int
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    answers = []
    for task in tasks:
        try:
            answers.append(globals()[function](task, folder, job, steps, rank))
        except Exception:
            print(f"{task}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # the others would wait for this one for ever
        if rank == 0:
            print(f"  {task}", file=sys.stderr, flush=True)
    if rank == 0:
        torch.save(answers, out)
    torch.distributed.barrier()
    os._exit(0)  # destroying a gloo group can wait for ever


# -------------------------------------------------------------------------------------------------------- compare


def loss_difference(found: Result, expected: Result) -> float:
    """Largest relative difference of a step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True))


def weight_difference(found: Result, expected: Result) -> tuple[float, float]:
    """‖found − expected‖ ÷ ‖expected‖ of all trained weights as one vector, and the largest of a single tensor.

    Tensors that begin at zero (norms' deviations, LoRA's B) are the latter: there it compares what training added, into
    which Adam turns the rounding noise of bfloat16 in full.
    """
    if found.weights.keys() != expected.weights.keys():
        raise SystemExit(f"other weights are trained: {sorted(found.weights.keys() ^ expected.weights.keys())[:4]}")
    distances = {n: (found.weights[n].double() - w.double()).norm() for n, w in expected.weights.items()}
    norms = {n: w.double().norm() for n, w in expected.weights.items()}
    whole = torch.stack(list(distances.values())).norm() / torch.stack(list(norms.values())).norm()
    return float(whole), max(float(distances[n] / norms[n]) for n in norms)


def parity(folder: str, job: worker.Job, steps: int, quick: bool) -> tuple[Table, list[dict[str, Any]]]:
    strategies = ["fsdp", "zero3", "none"]
    cells = [
        Cell(strategy, workers, tuning, accumulation, dtype)
        for dtype in LIMITS
        for tuning in ADAPTERS
        for strategy in strategies
        for workers in (1, 2)
        for accumulation in (1, 4)
        if not (quick and (workers == 1 or accumulation == 1))
    ]
    references = {
        tuning: reference(recipe_of(folder, steps, f"model.adapter={ADAPTERS[tuning]}"), job, steps)
        for tuning in ADAPTERS
    }
    results: dict[Cell, Result] = {}
    for workers in sorted({cell.workers for cell in cells}):
        mine = [cell for cell in cells if cell.workers == workers]
        results |= dict(zip(mine, spawn(workers, folder, "run_cell", mine, job, steps), strict=True))
    table = Table(title=f"{steps} steps against a plain float32 loop, relative: loss, weights, worst tensor")
    for column in ("training", "dtype", "accumulation", *(f"{s} × {w}" for s in strategies for w in (1, 2))):
        table.add_column(column, justify="right" if "×" in column else "left")
    rows = []
    for dtype, limit in LIMITS.items():
        for tuning in ADAPTERS:
            for accumulation in (1, 4):
                texts = []
                for strategy in strategies:
                    for workers in (1, 2):
                        cell = Cell(strategy, workers, tuning, accumulation, dtype)
                        if cell not in results:
                            texts.append("")
                            continue
                        loss = loss_difference(results[cell], references[tuning])
                        whole, worst = weight_difference(results[cell], references[tuning])
                        good = max(loss, whole) <= limit  # also false for NaN
                        if dtype == "float32":
                            good = good and worst <= limit
                        rows.append({**cell.__dict__, "loss": loss, "weights": whole, "tensor": worst, "ok": good})
                        texts.append(("" if good else "[red]") + " ".join(f"{d:.0e}" for d in (loss, whole, worst)))
                if any(texts):
                    table.add_row(tuning, dtype, str(accumulation), *texts)
    table.caption = "limits: float32 1e-04, each; bfloat16 1e-02, loss and weights"
    return table, rows


# --------------------------------------------------------------------------------------------------- cross-restore


@dataclass(frozen=True)
class Leg:
    """One half of an interrupted run: `source` wrote the checkpoint, `target` goes on from it (None: writes it)."""

    source: tuple[str, int]
    target: tuple[str, int] | None
    tuning: str = "full"

    @property
    def where(self) -> str:
        return f"restore-{self.tuning}-{self.source[0]}-{self.source[1]}"


def run_leg(leg: Leg, folder: str, job: worker.Job, steps: int, rank: int) -> Result:
    strategy_name, workers = leg.target or leg.source
    recipe = recipe_of(folder, steps, *Cell(strategy_name, workers, leg.tuning, 1, "float32").overrides())
    strategy = worker.build(recipe, Layout(rank, workers, torch.device("cpu"), torch.float32)).strategy
    half, where = steps // 2, f"{folder}/{leg.where}"
    if leg.target is None:
        losses = steps_of(recipe, strategy, job.order, 0, half, steps)
        checkpoint.save(where, half, worker.state(strategy), {}, rank, workers)
    else:
        checkpoint.restore(f"{where}/{checkpoint.name(half)}", worker.state(strategy))
        strategy.restored()
        losses = steps_of(recipe, strategy, job.order, half, steps, steps)
    return Result(losses, whole_weights(strategy))


def cross_restore(folder: str, job: worker.Job, steps: int, quick: bool) -> tuple[list[Table], list[dict[str, Any]]]:
    ways = [(s, w) for s in ("fsdp", "zero3") for w in ((1, 2) if quick else (1, 2, 4))]
    tunings = ["full"] if quick else list(ADAPTERS)
    references = {
        tuning: reference(recipe_of(folder, steps, f"model.adapter={ADAPTERS[tuning]}"), job, steps)
        for tuning in tunings
    }
    answers: dict[Leg, Result] = {}
    for targets in ([None], ways):
        legs = [Leg(source, target, tuning) for tuning in tunings for source in ways for target in targets]
        for workers in sorted({w for _, w in ways}):
            mine = [leg for leg in legs if (leg.target or leg.source)[1] == workers]
            answers |= dict(zip(mine, spawn(workers, folder, "run_leg", mine, job, steps), strict=True))
    tables, rows = [], []
    for tuning in tunings:
        expected = references[tuning]
        table = Table(
            title=f"{tuning}: written under (rows), restored under (columns), {steps // 2} + {steps // 2} steps"
        )
        table.add_column("")
        for name, workers in ways:
            table.add_column(f"{name} × {workers}", justify="right")
        for source in ways:
            texts = []
            for target in ways:
                first, second = answers[Leg(source, None, tuning)], answers[Leg(source, target, tuning)]
                joined = Result([*first.losses, *second.losses], second.weights)
                difference = max(loss_difference(joined, expected), *weight_difference(joined, expected))
                good = difference <= LIMITS["float32"]
                rows.append(
                    {"source": source, "target": target, "tuning": tuning, "difference": difference, "ok": good}
                )
                texts.append(f"[{'green' if good else 'red'}]{difference:.0e}")
            table.add_row(f"{source[0]} × {source[1]}", *texts)
        tables.append(table)
    return tables, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a quarter of the cells")
    parser.add_argument("--out", help="folder for parity.json and what is trained; default: a temporary one")
    options = parser.parse_args()
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="ray_ft_parity_") as scratch:
        folder = options.out or scratch
        torch.set_num_threads(2)
        write_demo(f"{folder}/demo", rows=2000, hidden_size=64, layers=2)
        recipe = recipe_of(folder, options.steps)
        job = launch.prepare_data(recipe, View(Console(quiet=True)), stream.in_process)
        table, cells = parity(folder, job, options.steps, options.quick)
        tables, restores = cross_restore(folder, job, options.steps, options.quick)
        for shown in (table, *tables):
            console.print(shown)
        failed = [row for row in [*cells, *restores] if not row["ok"]]
        console.print(f"{len(cells)} ways of training and {len(restores)} restores, {len(failed)} over the limit")
        if options.out:
            Path(folder, "parity.json").write_text(json.dumps({"parity": cells, "restore": restores}, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
