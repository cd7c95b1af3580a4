"""Pairs from files to a trained run: what is rejected, the reference beside the rows, resuming, evaluating."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import recipe_of
from rich.console import Console

from ray_ft import paths
from ray_ft.data import references as stored
from ray_ft.data.lines import Reject
from ray_ft.data.order import Order
from ray_ft.data.pack import pairs
from ray_ft.data.prepare import prepare
from ray_ft.data.render import Tokens
from ray_ft.data.samples import Pair
from ray_ft.data.stream import in_process
from ray_ft.data.work import Work
from ray_ft.demo import DemoPaths, preference
from ray_ft.evaluate.losses import Judged, _Judge
from ray_ft.export.checks.text import real_samples
from ray_ft.inspect import show
from ray_ft.recipe import Recipe
from ray_ft.train import launch, objective, references
from ray_ft.train.metrics import read_metrics
from ray_ft.trained import Trained
from ray_ft.view import View


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shown() -> tuple[View, io.StringIO]:
    out = io.StringIO()
    return View(Console(file=out, soft_wrap=True)), out


def recipe_for(demo: DemoPaths, storage: Path, *overrides: str, lines: int = 60) -> Recipe:
    """Over the first pairs of the demo."""
    folder = storage / "pairs"
    folder.mkdir(exist_ok=True)
    drawn = preference.draw(600, 0)[""]
    for name, count in (("train", lines), ("heldout", 20)):
        kept = getattr(drawn, name)[:count]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    options = [
        f"data.train=[{{path: {folder}/train.jsonl, format: preference}}]",
        f"data.eval=[{{path: {folder}/heldout.jsonl, format: preference}}]",
        "data.seq_len=160",
        "train.global_batch=4",
        "train.micro_batch=2",
    ]
    return recipe_of(demo, storage, *options, *overrides)


def test_the_reference_is_computed_once_and_read_along_with_the_rows(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(demo, tmp_path)
    plain = prepare(recipe, "train", demo.base, in_process)
    assert plain.read(plain.units).reference is None
    prepared = references.with_references(plain, recipe, gpus=None)
    rows = prepared.read(prepared.units)
    assert rows.reference is not None and rows.reference.dtype == np.float32
    documents = 2 * pairs(rows.flags)
    assert rows.reference.shape == (prepared.rows, documents.max())
    for said, count in zip(rows.reference, documents, strict=True):
        assert (said[:count] < -1).all() and not said[count:].any()
    monkeypatch.setattr(references, "whole", lambda *_: pytest.fail("the base was asked again"))
    again = references.with_references(plain, recipe, gpus=None)
    assert again.references == prepared.references
    # In whatever order rows come, each brings its own; padding has none.
    order = Order.of(recipe, prepared)
    (part,) = order.slices(1, order.rows // 2)  # some of the rows of a unit, in another order
    read = part.read(prepared)
    assert len(read) > 4
    known = {ids.tobytes(): said for ids, said in zip(rows.input_ids, rows.reference, strict=True)}
    assert read.reference is not None
    for ids, said in zip(read.input_ids, read.reference, strict=True):
        assert np.array_equal(known[ids.tobytes()], said)
    padding = list(order.slices(order.rows, order.rows + 3))[-1].read(prepared)
    assert padding.reference is not None and not padding.reference.any() and len(padding) == 3


def test_an_interrupted_pass_over_the_base_goes_on(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_ft.data.work.SEGMENT_TOKENS", 1000)
    recipe = recipe_for(demo, tmp_path)
    plain = prepare(recipe, "train", demo.base, in_process)
    assert len(plain.units) > 2
    written: list[Any] = []
    write = stored.write

    def failing(location: str, unit: Any, said: np.ndarray) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(unit)
        write(location, unit, said)

    with monkeypatch.context() as patch:
        patch.setattr(stored, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            references.with_references(plain, recipe, gpus=None)
    rest: list[Any] = []
    monkeypatch.setattr(stored, "write", lambda location, unit, said: (rest.append(unit), write(location, unit, said)))
    prepared = references.with_references(plain, recipe, gpus=None)
    assert written + rest == list(plain.units)
    assert len(prepared.read(prepared.units)) == plain.rows


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    demo: DemoPaths, tmp_path: Path, shown: tuple[View, io.StringIO], lora: bool
) -> None:
    view, out = shown
    overrides = ["train.checkpoint.every=3", "train.epochs=2", "train.eval_every=3", "train.log_every=1"]
    overrides += ["model.adapter={name: lora, rank: 4}"] if lora else []
    whole = recipe_for(demo, tmp_path, "run.name=whole", *overrides)
    outcome = launch.train(whole, view)
    assert outcome.complete and outcome.total > 4
    halves = recipe_for(demo, tmp_path, "run.name=halves", *overrides)
    assert launch.train(halves, view, asked=_after(halves, 2)).taken < outcome.total
    assert launch.train(halves, view).complete
    drop = ("tokens_per_second", "step_seconds", "data_wait_share", "memory_gib", "checkpoint_seconds")
    found, wanted = (
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(one.run.dir)]
        for one in (halves, whole)
    )
    assert found[-1] == wanted[-1]
    assert {row["step"]: row["loss"] for row in found} == {row["step"]: row["loss"] for row in wanted}
    assert {"reward_accuracy", "reward_margin", "eval_reward_accuracy", "eval_reward_margin"} <= wanted[-1].keys()
    assert wanted[-1]["reward_margin"] > 0 and wanted[-1]["loss"] < wanted[0]["loss"]
    text = out.getvalue()
    assert ("switching the adapter off" in text) == lora
    assert ("computed once and kept beside the rows" in text) != lora
    assert "reward accuracy" in text
    _judged_alike(whole, wanted[-1], lora)


def _judged_alike(recipe: Recipe, last: dict[str, float], lora: bool) -> None:
    """Evaluating the run afterwards gives what the last evaluation of its training said; the base has no rewards."""
    trained = Trained.of(recipe.run.dir.root)
    rows = trained.prepared("eval")
    assert rows is not None
    known = rows if lora else references.with_references(rows, recipe, gpus=None)
    judge = _Judge([Judged(trained, known), Judged(recipe.model.location, rows, "itself")], recipe, cuda=False)
    order = Order.once(rows)
    for number in range(2):
        sums = objective.Sums(objective.PAIRS, (), torch.device("cpu"))
        for part in order.slices(0, order.rows):
            sums.values += judge.judge(number, part)[1]
        means = sums.read(sums.values.tolist())
        assert means.targets == 20
        if number:
            assert (means.loss, means.statistics["reward_margin"]) == (pytest.approx(math.log(2)), 0.0)
            assert means.statistics["reward_accuracy"] == 0.5
        else:
            found = {"eval_loss": means.loss, **dict(means.more("eval"))}
            assert found == pytest.approx({name: last[name] for name in found}, rel=1e-4, abs=1e-5)
    origin, samples = real_samples(trained)  # what the gate compares templates on
    assert origin == "data.train" and all(isinstance(sample, Pair) for sample in samples)


def _after(recipe: Recipe, steps: int) -> Callable[[], Any]:
    from ray_ft.train.asks import Ask

    def asked() -> Any:
        return Ask.STOP if len(read_metrics(recipe.run.dir)) >= steps else Ask.NOTHING

    return asked


# ------------------------------------------------------------------------------------------------------------- rejects


@pytest.mark.parametrize(
    ("trained", "rejected_at", "kept"),
    [
        ([0, 1, 0, 1], 2, True),
        ([0, 1, 0, 0], 2, False),
        ([0, 0, 0, 1], 2, False),
        ([0, 1], 0, False),  # the chosen answer gives no token at all
        ([0, 1], None, True),
        ([0, 0], None, False),
    ],
)
def test_both_answers_of_a_pair_need_a_target(trained: list[int], rejected_at: int | None, kept: bool) -> None:
    tokens = Tokens(np.arange(len(trained), dtype=np.int32), np.array(trained, dtype=bool), rejected_at=rejected_at)
    work = Work("", "", (), seq_len=8, packing=True, long_rows="drop", segment_tokens=8, tokenizer={}, code=False)
    found, cut = work._fit(tokens)
    assert found is tokens if kept else isinstance(found, Reject) and found.reason == "nothing to train on"
    assert not cut


def test_rows_that_are_no_pairs_are_rejected_at_their_line(demo: DemoPaths, tmp_path: Path) -> None:
    good = {"prompt": "one", "chosen": "uno", "rejected": "dos"}
    lines: list[tuple[dict[str, Any], str | None]] = [
        (good, None),
        ({**good, "rejected": "uno"}, "chosen and rejected are the same"),
        ({**good, "rejected": " uno "}, "chosen and rejected are the same"),  # the template trims
        ({**good, "chosen": " "}, "field 'chosen' is empty"),
        ({"prompt": "one", "chosen": "uno"}, "missing field 'rejected'"),
        ({**good, "rejected": "dos\ud800"}, "field 'rejected' holds a lone surrogate"),
        ({**good, "rejected": "dos<end_of_turn>"}, "holds the special token '<end_of_turn>'"),
        ({**good, "prompt": ""}, "field 'prompt' is empty"),
        ({**good, "prompt": [{"role": "assistant", "content": "?"}]}, "the prompt's last message is not the user's"),
        ({**good, "chosen": "uno " * 200}, "longer than seq_len"),
    ]
    recipe = recipe_for(demo, tmp_path, "data.max_bad_rows=1")
    file = Path(recipe.data.train[0].path[0])
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in lines))
    prepared = prepare(recipe, "train", demo.base, in_process)
    rejects = [json.loads(line) for line in paths.read_text(prepared.rejects).splitlines()]
    wanted = [(number, why) for number, (_, why) in enumerate(lines, start=1) if why]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == wanted
    assert prepared.counts.rejected == Counter(why for _, why in wanted)
    assert prepared.counts.used == 1


def test_both_answers_of_a_pair_are_shown(demo: DemoPaths, tmp_path: Path) -> None:
    recipe = recipe_for(demo, tmp_path)
    out = io.StringIO()
    show(recipe, {"train": prepare(recipe, "train", demo.base, in_process)}, Console(file=out, width=400), examples=2)
    lines = [line.strip() for line in out.getvalue().splitlines() if "⟦" in line]
    assert [line.split(":")[0] for line in lines] == ["chosen", "rejected"] * 2
    for chosen, rejected in zip(lines[::2], lines[1::2], strict=True):
        asked, one = chosen.removeprefix("chosen: ").split("⟦")
        assert rejected.startswith(f"rejected: {asked}⟦") and not rejected.endswith(f"⟦{one}")
