"""The benchmark of training steps: both sides get the same rows, and rates and losses are computed as they are said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import heldout, trainer
from benchmarks.peers import trl_sft
from ray_ft.data import pack, stream
from ray_ft.demo import LANGUAGES, PROMPT, DemoPaths
from ray_ft.recipe import Recipe
from ray_ft.train import objective
from ray_ft.train.launch import prepare_job
from ray_ft.train.worker import Job
from ray_ft.view import View


def prepared(settings: Recipe) -> Job:
    return prepare_job(settings, View(Console(quiet=True)), stream.in_process)


def documents(job: Job) -> list[tuple[int, ...]]:
    rows = job.train.read(job.train.units)
    found = []
    for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
        edges = [*np.flatnonzero(flags & pack.START).tolist(), len(ids)]
        found += [tuple(ids[a:b].tolist()) for a, b in itertools.pairwise(edges) if flags[a] & pack.REAL]
    return sorted(found)


def raw_rows(files: tuple[str, ...]) -> list[dict[str, Any]]:
    import gzip
    import json

    found: list[dict[str, Any]] = []
    for file in files:
        if file.endswith(".parquet"):
            found += pq.read_table(file).to_pylist()
        else:
            body = Path(file).read_bytes()
            lines = (gzip.decompress(body) if file.endswith(".gz") else body).decode().splitlines()
            found += [json.loads(line) for line in lines]
    return found


def test_both_sides_train_the_same_documents(demo: DemoPaths, tmp_path: Path) -> None:
    setting = trainer.Setting(demo, str(tmp_path))
    job = prepared(setting.recipe(4, 0, "same"))
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    theirs = []
    for row in raw_rows(demo.train):
        turns = trl_sft.conversation(row, PROMPT, LANGUAGES)
        ids = tokenizer.apply_chat_template(turns["prompt"] + turns["completion"], return_dict=True)["input_ids"]
        theirs.append(tuple(ids))
    assert documents(job) == sorted(theirs)


def test_the_peer_is_told_what_the_recipe_says(demo: DemoPaths, tmp_path: Path) -> None:
    setting = trainer.Setting(demo, str(tmp_path), threads=3, steps=7)
    settings = setting.recipe(2, 5, "said")
    told = setting.for_trl(settings, "out")
    train = settings.train
    assert (train.workers, train.max_steps, train.schedule.name) == (0, 7, "constant")
    said = {name: told[name] for name in ("global_batch", "micro_batch", "seed", "seq_len", "steps", "threads")}
    assert said == {"global_batch": 8, "micro_batch": 2, "seed": 5, "seq_len": 256, "steps": 7, "threads": 3}
    optimizer = train.optimizer
    assert told["betas"] == [*optimizer.betas] and told["clip_norm"] == train.clip_norm == 1.0
    assert (told["lr"], told["eps"], told["weight_decay"]) == (optimizer.lr, optimizer.eps, optimizer.weight_decay)
    assert not told["save"] and setting.recipe(2, 5, "x").data.train[0].path == list(demo.train)
    assert replace(setting, steps=0).for_trl(settings, "out")["save"]
    assert replace(setting, steps=0).recipe(2, 5, "all").train.max_steps is None


def test_rates_are_over_the_steps_after_warm_up(demo: DemoPaths, tmp_path: Path) -> None:
    setting = trainer.Setting(demo, str(tmp_path))
    warm = trainer.WARM_UP
    tokens, targets, seconds = [999] * warm + [100, 50], [99] * warm + [10, 20], [9.0] * warm + [1.0, 2.0]
    found = trainer.found(setting, tokens, targets, seconds, took=200.0)
    assert found["rate"] == 50 and found["trained_rate"] == 10 and found["step"] == 1.5
    assert found["tokens"] == 999 * warm + 150 and found["steps"] == warm + 2
    assert found["beside"] == pytest.approx(200 - 9 * warm - 3)
    with pytest.raises(ValueError, match="counts"):
        trainer.found(setting, tokens[1:], targets, seconds, 200.0)
    with pytest.raises(ValueError, match="warm-up"):
        trainer.found(setting, tokens[:warm], targets[:warm], seconds[:warm], 200.0)


def test_padding_is_not_counted(demo: DemoPaths, tmp_path: Path) -> None:
    job = prepared(trainer.Setting(demo, str(tmp_path)).recipe(4, 0, "counted"))
    steps = -(-job.train.counts.packed // trainer.GLOBAL_BATCH)
    tokens, targets = trainer.counted(job.order, steps)
    assert len(tokens) == len(targets) == steps
    assert sum(tokens) == job.train.counts.tokens == sum(map(len, documents(job)))
    assert sum(targets) == job.train.counts.trained_tokens
    assert sum(tokens) < job.train.counts.packed * trainer.SEQ_LEN


def test_the_peers_counts_are_summed_by_step() -> None:
    assert trl_sft.per_step([1, 2, 3, 4, 5], 2, 3) == [3, 7, 5]


def test_the_peers_collator_is_counted_and_its_first_tokens_are_no_targets() -> None:
    batch = {"input_ids": torch.zeros(1, 5), "labels": torch.tensor([[-100, -100, 3, -100, 5]])}
    counted = trl_sft.Counted(lambda examples: batch)
    assert counted([]) is batch and counted.tokens == [5] and counted.targets == [2]
    padded = trl_sft.Counted(lambda examples: batch | {"attention_mask": torch.ones(1, 5)})
    with pytest.raises(AssertionError, match="free of padding"):
        padded([])


def test_arms_that_trained_other_rows_are_not_compared() -> None:
    arm = {"documents": 3, "tokens": 30}
    trainer.check_alike({"a": arm, "b": dict(arm)})
    with pytest.raises(ValueError, match="different tokens"):
        trainer.check_alike({"a": arm, "b": arm | {"tokens": 31}})


def test_figures_are_ratios_of_ours_to_theirs() -> None:
    ours = {"rate": 30.0, "trained_rate": 6.0, "loss": 0.2}
    theirs = {"rate": 20.0, "trained_rate": 4.0, "loss": 0.1}
    found = {one.name.split(",")[0]: one for one in trainer.figures([{trainer.OURS: ours, trainer.THEIRS: theirs}])}
    assert found["tokens/s without padding"].values == [1.5] and found["tokens/s without padding"].reached
    assert found["trained tokens/s"].values == [1.5]
    loss = found["held-out loss after the same tokens"]
    assert loss.values == [2.0] and loss.reached is False


def test_held_out_loss_is_that_of_the_answers_alone(demo: DemoPaths, make_recipe: Callable[..., Recipe]) -> None:
    """Row by row in padded batches, it is what packed rows give by ray-ft's own loss."""
    rows = pq.read_table(demo.heldout).to_pylist()
    model = AutoModelForCausalLM.from_pretrained(demo.base, dtype=torch.float32).eval()
    found = heldout.loss(model, AutoTokenizer.from_pretrained(demo.base), rows, size=37)
    settings = make_recipe()
    job = prepared(settings)
    assert job.held_out is not None and job.held_out.counts.used == len(rows)
    packed = job.held_out.read(job.held_out.units)
    with torch.no_grad():
        sums = objective.language(model, settings)(*objective.tensors(packed, torch.device("cpu")))
    assert found == pytest.approx(sums.sum().item() / job.held_out.counts.trained_tokens, rel=1e-5)
