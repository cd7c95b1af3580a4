"""Classifiers: loaded from a base, the same loss as transformers' own class, the same steps under every strategy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import recipe_of, run, weights
from transformers import AutoModelForSequenceClassification

from ray_ft.data.pack import Rows, pack
from ray_ft.data.render import Tokens
from ray_ft.data.stream import Batch
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError
from ray_ft.model import adapt, load
from ray_ft.model.classify import HEAD, LabelLoss, head, labelled, new_names
from ray_ft.model.loss import IGNORE
from ray_ft.recipe import Recipe
from ray_ft.recipe.model import Model
from ray_ft.strategy import Layout
from ray_ft.train import loop, objective, worker

NAMES = ["a", "b", "c"]
LR, WEIGHTS = 2e-3, (0.5, 2.0, 1.0)


def samples(count: int = 12, seed: int = 0) -> list[tuple[list[int], int]]:
    """(Tokens of a text, its label) of many lengths."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(6, 40, int(rng.integers(1, 30))).tolist(), int(rng.integers(0, 3))) for _ in range(count)]


def rows_of(made: list[tuple[list[int], int]], packing: bool = True) -> Rows:
    tokens = [Tokens(np.array([*ids, y], np.int32), np.arange(len(ids) + 1) == len(ids)) for ids, y in made]
    return pack(tokens, 64, packing=packing, pad_id=0)[0]


def filled(folder: str, labels: list[str] | None = None) -> Any:
    model = load.build(load.load_config(folder, labels or NAMES))
    load.allocate(model, torch.device("cpu"))
    load.fill(model, folder, load.whole_spans(model))
    return model


@pytest.fixture(params=models.FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return models.write(tmp_path / "base", request.param, torch.float32)


def test_a_base_gives_all_but_the_head_and_the_loss_is_that_of_transformers_class(base: str, tmp_path: Path) -> None:
    model = filled(base)
    assert not head(model).weight.any()
    batch = objective.tensors(rows := rows_of(samples()), torch.device("cpu"))
    first = LabelLoss(model)(*batch)
    assert first[:, 0].sum().item() == pytest.approx(12 * math.log(3), rel=1e-5)  # of all labels alike

    torch.nn.init.normal_(head(model).weight)
    model.save_pretrained(tmp_path / "classifier")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    assert [theirs.config.id2label[n] for n in range(3)] == NAMES
    logits = torch.cat([theirs(input_ids=torch.tensor([ids])).logits for ids, _ in samples()])
    wanted = torch.tensor([y for _, y in samples()])
    found = LabelLoss(model).eval()(*batch)
    assert len(found) == len(rows) < 12  # packed
    assert found[:, 0].sum().item() == pytest.approx(F.cross_entropy(logits, wanted, reduction="sum").item(), rel=1e-4)
    counts = found[:, 1:].sum(0).view(3, 3)
    assert counts[0].sum().item() == (logits.argmax(-1) == wanted).sum().item()
    assert counts[1].tolist() == torch.bincount(wanted, minlength=3).tolist()
    assert counts[2].tolist() == torch.bincount(logits.argmax(-1), minlength=3).tolist()
    logs = LabelLoss(model).log_probabilities(
        *objective.tensors(rows_of(samples(), packing=False), torch.device("cpu"))
    )
    torch.testing.assert_close(logs, torch.log_softmax(logits, -1), rtol=1e-4, atol=1e-4)


def test_an_existing_classifier_goes_on_if_its_labels_are_those(tmp_path: Path, demo: DemoPaths) -> None:
    model = filled(demo.base)
    torch.nn.init.normal_(head(model).weight)
    folder = str(tmp_path / "classifier")
    model.save_pretrained(folder)
    torch.testing.assert_close(head(filled(folder)).weight, head(model).weight)
    with pytest.raises(ModelError, match=r"classifies by 'a', 'b', 'c', and model.labels is 'b', 'a', 'c'"):
        filled(folder, ["b", "a", "c"])
    with pytest.raises(ModelError, match="is a classifier of a, b, c, which gives probabilities of labels and no text"):
        load.load_config(folder)


def test_a_base_that_lacks_anything_else_is_refused(tmp_path: Path) -> None:
    folder = models.write(tmp_path / "base", "llama", torch.float32)
    models.rename(Path(folder), lambda key: key.replace("layers.1.mlp.up_proj", "layers.1.mlp.sideways"))
    with pytest.raises(ModelError, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\) and 1 unexpected"):
        filled(folder)


def test_weights_count_in_training_alone_and_padding_has_a_gradient_for_all(demo: DemoPaths) -> None:
    model = filled(demo.base)
    torch.nn.init.normal_(head(model).weight)
    module, batch = LabelLoss(model, WEIGHTS), objective.tensors(rows_of(samples()), torch.device("cpu"))
    logs = LabelLoss(model).log_probabilities(
        *objective.tensors(rows_of(samples(), packing=False), torch.device("cpu"))
    )
    wanted = torch.tensor([y for _, y in samples()])
    weighted = F.nll_loss(logs, wanted, torch.tensor(WEIGHTS), reduction="sum")
    assert module.train()(*batch)[:, 0].sum().item() == pytest.approx(weighted.item(), rel=1e-5)
    plain = F.nll_loss(logs, wanted, reduction="sum")
    assert module.eval()(*batch)[:, 0].sum().item() == pytest.approx(plain.item(), rel=1e-5)

    found = module.train()(*objective.tensors(Rows.blank(2, 64), torch.device("cpu")))
    assert not found.any()
    found[:, 0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- what is trained


def meta(**settings: Any) -> tuple[Any, adapt.Adapted]:
    config = models.config("gemma3")
    model = load.build(labelled(config, NAMES, "here"))
    chosen = Model(path="x", labels=NAMES, **settings)
    return model, adapt.adapt(model, chosen, torch.float32, torch.bfloat16)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_has_the_head_trained_beside_it() -> None:
    model, adapted = meta(adapter={"rank": 2})
    others = {name for name in trained(model) if ".lora_" not in name}
    assert others == {HEAD} and not any(name.startswith("score.lora") for name in trained(model))
    assert adapted.adapter == "lora rank 2 on 21 layers"
    assert dict(model.named_parameters())[HEAD].dtype == torch.float32


def test_the_head_alone_can_be_trained_and_a_new_one_must_be() -> None:
    model, _ = meta(freeze=["language_model"])
    assert {name for name in trained(model) if "multi_modal" not in name} == {HEAD}
    frozen, _ = meta(freeze=["score*"])
    with pytest.raises(ModelError, match=r"model\.freeze covers score\.weight, which is new"):
        new_names(frozen, ())
    with pytest.raises(ModelError, match=r"names score, a classifier's last layer, which is trained whole"):
        meta(adapter={"rank": 2, "target_modules": ["*score*"]})


# ----------------------------------------------------------------------------------------------- the same everywhere


def recipe_for(demo: DemoPaths, strategy: str, world: int, accumulation: int, *more: str) -> Recipe:
    source = json.dumps([{"path": "labels.jsonl", "format": "labels"}])  # which nothing here reads
    return recipe_of(
        demo, "/none", f"model.labels={json.dumps(NAMES)}", f"data.train={source}", "data.eval=[]",
        f"train.strategy={strategy}", f"train.workers={world}", f"train.micro_batch={8 // (world * accumulation)}",
        "train.optimizer.eps=1e-6", *more,
    )  # fmt: skip


def batch_of(step: int) -> Rows:
    rows = rows_of(samples(40, step))
    return Rows.concatenate([rows, Rows.blank(16 - len(rows), 64)]).take(slice(0, 8))


class Counted:
    """Stands in for counts of the training rows: as many of the labels that the weights average 1 over them."""

    def of_labels(self, count: int, weights: Any) -> list[float]:
        return [4.0, 1.0, 1.0]


def train_all(rank: int, world: int, demo: DemoPaths, cases: list[tuple[str, int, str]]) -> list[Any]:
    """For each (strategy, accumulation, setting): what each step said, and the final weights."""
    found = []
    for name, accumulation, more in cases:
        recipe = recipe_for(demo, name, world, accumulation, more, f"train.class_weights={{b: {WEIGHTS[1]}}}")
        layout = Layout(rank, world, torch.device("cpu"), torch.float32)
        strategy = worker.build(recipe, layout, Counted()).strategy  # type: ignore[arg-type]
        share, said = recipe.train.rows_per_worker, []
        for step in range(3):
            mine = batch_of(step).take(slice(rank * share, (rank + 1) * share))
            result = loop.train_step(strategy, Batch(0, mine), recipe.train, LR, objective=objective.of(recipe))
            said.append((result.loss, result.norm, result.more["accuracy"], result.targets))
        found.append((said, weights(strategy)))
    return found


@pytest.fixture(scope="module")
def expected(demo: DemoPaths) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """By transformers' own class, one text a row, torch's own weighted loss, and torch's AdamW."""
    # Over rows with counts 4, 1, 1 the weights 1, 2, 1 average 7/6.
    scaled = torch.tensor([1.0, 2.0, 1.0]) * 6 / 7
    model = AutoModelForSequenceClassification.from_pretrained(
        demo.base, num_labels=3, dtype=torch.float32, attn_implementation="eager"
    )
    torch.nn.init.zeros_(model.score.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    said = []
    for step in range(3):
        rows = batch_of(step)
        texts = []
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            start = 0
            for end in np.flatnonzero(flags & 4).tolist():
                texts.append((ids[start:end].tolist(), int(ids[end])))
                start = end + 1
        logits = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids, _ in texts])
        wanted = torch.tensor([y for _, y in texts])
        loss = F.cross_entropy(logits, wanted, scaled, reduction="sum") / len(texts)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        said.append((loss.item(), norm, (logits.argmax(-1) == wanted).float().mean().item(), len(texts)))
    return said, {name: p.detach() for name, p in model.named_parameters()}


CASES = [("fsdp", 1, "run.seed=1"), ("zero3", 2, "run.seed=1"), ("none", 4, "run.seed=2")]


@pytest.mark.parametrize("world", [1, 2])
def test_steps_equal_one_text_a_row_in_one_process(
    world: int, demo: DemoPaths, expected: tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]
) -> None:
    said, final = expected
    assert said[0][0] > said[-1][0]  # something was learnt, so equality means something
    for ranks in run(world, train_all, demo, CASES):
        for case, (found, ours) in zip(CASES, ranks, strict=True):
            np.testing.assert_allclose(found, said, rtol=2e-4, err_msg=str(case))
            assert ours.keys() == final.keys() and HEAD in ours
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, final[name], rtol=0, atol=2e-5, msg=f"{case} {name}")


def test_no_text_sees_a_label_and_the_comparison_would_notice(demo: DemoPaths) -> None:
    model = filled(demo.base)
    torch.nn.init.normal_(head(model).weight)
    module, (ids, positions, labels) = LabelLoss(model), objective.tensors(rows_of(samples()), torch.device("cpu"))
    others = torch.where(labels == IGNORE, ids, (ids + 1) % 3)
    said = module.log_probabilities(ids, positions, labels)
    assert torch.equal(module.log_probabilities(others, positions, labels), said)
    # The state of the label's own token, one place further, tells them apart.
    leaked = module.log_probabilities(ids, positions, labels.roll(1, 1))
    assert not torch.equal(module.log_probabilities(others, positions, labels.roll(1, 1)), leaked)
