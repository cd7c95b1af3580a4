"""The chaos benchmark: its judge says no where something is wrong, its faults follow from the seed, and it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import chaos
from ray_ft import artifacts
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.recipe import Recipe
from ray_ft.span import Span
from ray_ft.train import checkpoint, launch, shards
from ray_ft.train.schedule import total_steps
from ray_ft.view import View

from .judge import Verdict, judge, last_checkpoint
from .training import Recovery

ROOT = Path(__file__).parents[2]
Make = Callable[..., Recipe]


@dataclass(frozen=True)
class Runs:
    """A finished run of two epochs and a copy of it, made anew for each fault that is planted."""

    run: Path
    copy: Path
    order: Order
    steps: int

    def verdict(self) -> Verdict:
        return judge(artifacts.RunDir(str(self.copy)), artifacts.RunDir(str(self.run)), self.order, self.steps)

    def with_fault(self, plant: Callable[[Path], Any]) -> Verdict:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.run, self.copy)
        plant(self.copy)
        return self.verdict()


@pytest.fixture
def runs(make_recipe: Make, tmp_path: Path) -> Runs:
    recipe = make_recipe(
        "data.ledger=true",
        "train.epochs=2",
        "train.global_batch=16",
        "train.log_every=1",
        "train.checkpoint.every=5",
    )
    view = View(Console(quiet=True))
    launch.train(recipe, view)
    job = launch.prepare_data(recipe, view, stream.in_process)
    run = Path(recipe.run.dir.root)
    return Runs(run, run.parent / "copy", job.order, total_steps(recipe, job.order))


def edit(file: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the rows of a JSON lines file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ledger(run: Path) -> Path:
    return run / "ledger" / "step_00000010.jsonl"


def change_tensor(run: Path, step: int, name: str) -> None:
    """Change one value of a checkpoint by as little as there is, with all checksums right."""
    tensors = last_checkpoint(artifacts.RunDir(str(run)), step)
    chosen = next(tensor for key, tensor in tensors.items() if key.startswith(name) and tensor.dim())
    value = chosen.view(-1)[:1]
    value.copy_(torch.nextafter(value, torch.tensor(float("inf"))))
    location = dict(checkpoint.committed(str(run / "checkpoints")))[step]
    state = checkpoint.verify(location)
    written = shards.write(location, 0, {key: Span.whole(tensor) for key, tensor in tensors.items()})
    checkpoint.commit(location, step, [written], {k: v for k, v in state.items() if k not in ("format", "step")})


def test_the_judge_says_no_to_each_planted_fault(runs: Runs) -> None:
    good = runs.with_fault(lambda run: None)
    assert good == Verdict("", 0.0, 0.0, True)
    assert good.broken(0) == good.broken(1e-5) == []
    metrics = "metrics.jsonl"

    # Rows: a step without a record, a sample twice in place of another, an epoch that lacks one, steps too many.
    verdict = runs.with_fault(lambda run: edit(ledger(run), lambda rows: rows.pop(2)))
    assert verdict.rows == "steps [8] left no record"
    verdict = runs.with_fault(lambda run: edit(ledger(run), lambda rows: rows[1].update(samples=rows[0]["samples"])))
    assert "more often than once" in verdict.rows
    verdict = runs.with_fault(lambda run: edit(ledger(run), lambda rows: rows[1]["samples"][0].clear()))
    assert "samples never" in verdict.rows
    more = {"step": runs.steps + 1, "first": 0, "samples": []}
    verdict = runs.with_fault(lambda run: edit(ledger(run), lambda rows: rows.append(more)))
    assert f"steps [{runs.steps + 1}] were recorded" in verdict.rows
    again = runs.with_fault(lambda run: shutil.copy(ledger(run), run / "ledger" / "step_00000011.jsonl"))
    assert again.rows == ""  # the same said twice, as after a checkpoint whose steps were taken again
    verdict = runs.with_fault(lambda run: shutil.rmtree(run / "ledger"))
    assert "left no record" in verdict.rows
    assert len(verdict.broken(0)) == len(verdict.broken(1e-5)) == 1

    # Losses: one changed by a hair, one not a number, one missing, one twice.
    verdict = runs.with_fault(lambda run: edit(run / metrics, lambda rows: rows[3].update(loss=rows[3]["loss"] + 1e-3)))
    assert 1e-5 < verdict.loss < 1e-3
    assert verdict.broken(0) == [f"loss: differs by {verdict.loss:.1e}, more than 0"]
    assert verdict.broken(1e-5) == [f"loss: differs by {verdict.loss:.1e}, more than 1e-05"]
    verdict = runs.with_fault(lambda run: edit(run / metrics, lambda rows: rows[3].update(loss=float("nan"))))
    assert verdict.loss == float("inf")
    for change in (lambda rows: rows.pop(3), lambda rows: rows.insert(3, rows[3])):
        verdict = runs.with_fault(lambda run, change=change: edit(run / metrics, change))
        for limit in (0, 1e-5):
            assert verdict.broken(limit) == ["loss: other steps are recorded, or one is not a number"]

    # The last checkpoint: one weight, one moment, changed in the last bit.
    verdict = runs.with_fault(lambda run: change_tensor(run, runs.steps, "model/"))
    assert 0 < verdict.weights < 1e-5
    assert "not equal to the bit" in verdict.broken(0)[0]
    assert verdict.broken(1e-5) == []
    verdict = runs.with_fault(lambda run: change_tensor(run, runs.steps, "optim/"))
    assert verdict.weights == 0
    assert "not equal to the bit" in verdict.broken(0)[0]
    with pytest.raises(KeyError):  # there is no last checkpoint
        runs.with_fault(lambda run: shutil.rmtree(run / "checkpoints"))


def test_the_benchmark_says_no_to_each_broken_promise() -> None:
    good = Recovery("worker killed", step=25, committed=20, resumed=20, seconds=14.0, model_seconds=2.0)
    faults = chaos.draw(1, 2, 100, chaos.WORKER_FAULTS)
    verdict = Verdict("", 0.0, 0.0, True)
    result = chaos.Result("fsdp", 1, 100, verdict, faults, [good, good], [0.01], 60.0, 120.0)
    assert result.broken(12) == []
    assert result.broken(11.9) == ["worker killed: 12.0 s until training went on, more than 11.9"] * 2

    def broken(**changes: Any) -> list[str]:
        return replace(result, **changes).broken(15)

    assert broken(recoveries=[good]) == ["2 faults were to be survived, 1 were"]
    unused = replace(good, resumed=10)
    assert broken(recoveries=[good, unused]) == ["worker killed: 15 steps lost, of 10 between checkpoints"]
    # The checkpoint of step 20 was being written when the fault came: the one before counts, and no older one.
    assert broken(recoveries=[good, replace(good, committed=10, resumed=10)]) == []
    assert len(broken(recoveries=[good, replace(good, committed=10, resumed=0)])) == 1
    off = replace(verdict, loss=2e-6, bits=False)
    assert len(broken(verdict=off)) == 2  # the losses and the bits
    assert broken(verdict=off, mode="elastic") == broken(verdict=off, mode="zero3") == []
    for wrong in (replace(off, loss=2e-5), replace(off, weights=2e-5), replace(off, rows="epoch 1: 1 samples never")):
        assert len(broken(verdict=wrong, mode="zero3")) == 1
    shown = Console(width=120, record=True, quiet=True)
    shown.print(chaos.table(replace(result, recoveries=[unused, good]), ["something"]))


def test_the_seed_draws_the_faults() -> None:
    kinds = chaos.HOST_FAULTS + chaos.WORKER_FAULTS
    one = chaos.draw(1, 5, 100, kinds)
    assert one == chaos.draw(1, 5, 100, kinds)
    assert one != chaos.draw(2, 5, 100, kinds)
    assert len({fault.step for fault in one}) == 5
    many = chaos.draw(3, 60, 100, kinds)
    assert sorted(fault.kind for fault in one) == sorted(kinds)  # five of them are one of each
    assert {fault.kind for fault in many} == set(kinds)
    assert [fault.step for fault in many] == sorted(fault.step for fault in many)
    assert many[0].step >= 3
    assert many[-1].step < 90


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_benchmark_runs_where_there_are_no_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "1", "--local", "--epochs", "1", "--within", "120"]
    command += ["--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "only workers are killed" in done.stderr
    assert "all promises kept" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["broken"] == []
    assert found["verdict"] == {"rows": "", "loss": 0.0, "weights": 0.0, "bits": True}
    assert len(found["recoveries"]) == 1
