"""A classifier's run: trained, resumed, judged and exported, in this process; and what the gate refuses of it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from distributed import recipe_of
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ray_ft import paths, report
from ray_ft.answers import Target
from ray_ft.answers.found import find
from ray_ft.data.order import Order
from ray_ft.demo import DemoPaths
from ray_ft.errors import ExportError, ModelError, ServeError
from ray_ft.evaluate import evaluate, labels, show
from ray_ft.evaluate.losses import Judged
from ray_ft.export import checks, export, gate
from ray_ft.export.case import Case
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.train.metrics import read_metrics
from ray_ft.trained import Trained
from ray_ft.view import View
from serving import models as serving_models

NAMES = ["de", "en", "es", "fr"]


def quiet() -> View:
    return View(Console(quiet=True))


@pytest.fixture(scope="module")
def rows(label_files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """300 rows to train on, and two files of 40 held-out ones; a few of the latter have a wrong label."""
    folder = tmp_path_factory.mktemp("rows")
    train, heldout = ([json.loads(line) for line in Path(f).read_text().splitlines()] for f in label_files)
    wrong = [
        {**row, "label": NAMES[NAMES.index(row["label"]) - 1]} if at < 3 else row for at, row in enumerate(heldout)
    ]
    parts = {"train": train[:300], "one": wrong[:40], "two": wrong[40:80]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tuple(str(folder / f"{name}.jsonl") for name in parts)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def recipe_for(demo: DemoPaths, rows: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    storage = tmp_path_factory.mktemp("runs")

    def make(name: str, *overrides: str) -> Recipe:
        train, *heldout = ([{"path": file, "format": "labels"}] for file in rows)
        return recipe_of(
            demo, storage, f"run.name={name}", f"model.labels={json.dumps(NAMES)}", f"data.train={json.dumps(train)}",
            f"data.eval={json.dumps(heldout[0] + heldout[1])}", "train.global_batch=4", "train.epochs=3",
            "train.optimizer.lr=5e-3", "train.eval_every=epoch", "train.class_weights=balanced", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def full(recipe_for: Callable[..., Recipe]) -> Recipe:
    recipe = recipe_for("full")
    assert launch.train(recipe, quiet()).complete
    return recipe


@pytest.fixture(scope="module")
def adapted(recipe_for: Callable[..., Recipe]) -> Recipe:
    recipe = recipe_for("lora", 'model.adapter={"rank": 4}', "train.optimizer.lr=1e-2")
    assert launch.train(recipe, quiet()).complete
    return recipe


def classified(recipe: Recipe) -> labels.Classified:
    """What the actor finds, without Ray."""
    trained = Trained.of(recipe.run.dir.root)
    prepared = trained.prepared("eval")
    assert prepared is not None
    order = Order.once(prepared, window_rows=2)  # several parts
    judge = labels._Classifier(Judged(trained, prepared), recipe, cuda=False)
    parts = [judge.judge(part) for part in order.slices(0, order.rows)]
    assert len(parts) > 1
    return labels.Classified.joined(parts)


# ---------------------------------------------------------------------------------------------------------- training


def test_it_learns_and_is_validated_after_each_epoch_with_its_accuracy(full: Recipe) -> None:
    metrics = read_metrics(full.run.dir)
    validated = [row for row in metrics if "eval_accuracy" in row]
    assert len(validated) == 3 and validated[-1]["step"] == metrics[-1]["step"]
    assert validated[-1]["eval_accuracy"] >= 0.9
    assert all({"accuracy", "eval_loss/data.eval.0", "eval_loss/data.eval.1"} <= row.keys() for row in validated)


def test_an_interrupted_run_ends_with_the_same_weights(full: Recipe, recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for("again", "train.checkpoint.every=11", "train.checkpoint.keep=9")
    launch.train(recipe, quiet())
    step = Trained.of(recipe.run.dir.root).found.step
    for name in paths.list_dir(recipe.run.dir.checkpoints):  # step_00000012-0a1b2c…
        if int(name[5:13]) > 11:
            shutil.rmtree(os.path.join(recipe.run.dir.checkpoints, name))
    assert launch.train(recipe, quiet()).taken == step - 11
    one, other = (Trained.of(each.run.dir.root).model(torch.device("cpu"), torch.float32) for each in (full, recipe))
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# --------------------------------------------------------------------------------------------------------- evaluation


def test_every_held_out_text_is_judged_once_as_transformers_does(full: Recipe, rows: tuple[str, str, str]) -> None:
    found = classified(full)
    trained = Trained.of(full.run.dir.root)
    model = trained.model(torch.device("cpu"), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    held = {f"{f}:{n}": json.loads(t) for f in rows[1:] for n, t in enumerate(Path(f).read_text().splitlines(), 1)}
    assert sorted(found.origins) == sorted(held)
    for at, origin in enumerate(found.origins):
        row = held[origin]
        logs = model(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0].log_softmax(-1)
        assert NAMES[found.wanted[at]] == row["label"] and found.found[at] == logs.argmax()
        assert found.losses[at] == pytest.approx(-logs[found.wanted[at]].item(), abs=1e-4)
        assert found.probability[at] == pytest.approx(logs.max().exp().item(), abs=1e-4)
        assert found.sources[at] == rows.index(origin.rpartition(":")[0]) - 1
        assert found.texts.get(at, row["text"]) == row["text"]


def test_the_report_says_what_sklearn_does_beside_the_commonest_label(full: Recipe) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    found, trained = classified(full), Trained.of(full.run.dir.root)
    prepared = trained.prepared("train")
    assert prepared is not None
    content = labels.build({"run": "full", "step": 1}, "full", full, found, prepared.counts)
    scores = content["model"]["scores"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(found.wanted, found.found))
    assert scores["macro_f1"] == pytest.approx(f1_score(found.wanted, found.found, average="macro"))
    last = [row for row in read_metrics(full.run.dir) if "eval_macro_f1" in row][-1]  # counted while it was trained
    assert (last["eval_macro_f1"], last["eval_accuracy"]) == pytest.approx((scores["macro_f1"], scores["accuracy"]))
    assert content["labels"]["confusion"]["counts"] == confusion_matrix(found.wanted, found.found).tolist()
    assert content["labels"]["confusion"]["answers"] == NAMES
    assert content["model"]["loss"] == pytest.approx(float(found.losses.mean()), rel=1e-6)

    share = float((found.wanted == NAMES.index("en")).mean())
    assert (content["base"]["name"], content["base"]["scores"]["accuracy"]) == ("always 'en'", pytest.approx(share))
    assert content["difference"]["accuracy"]["low"] > 0  # better than chance
    assert 1.0 < content["base"]["loss"] < 2.0
    groups = content["groups"]["source"]
    assert {name: group["rows"] for name, group in groups.items()} == {
        "data.eval.0 (one.jsonl)": 40, "data.eval.1 (two.jsonl)": 40
    }  # fmt: skip
    sure = [row["probability"] for row in content["worst"]]
    assert len(sure) >= 3 and sure == sorted(sure, reverse=True)
    assert all(row["answer"] != row["reference"] and row["prompt"] for row in content["worst"])
    assert labels.build({"run": None, "step": None}, "x", full, found, None)["base"] is None

    console = Console(record=True, width=120, file=io.StringIO())
    show(content, View(console))
    shown = console.export_text()
    for words in ("80 held-out rows classified by transformers", "commonest label", "precision", "label ↓ answer →",
                  "% sure: '", "data.eval.1 (two.jsonl)"):  # fmt: skip
        assert words in shown
    paths.write_json(full.run.dir.evaluation, content)
    page = Path(report.report(full.run.dir.root, quiet())).read_text()
    for words in ("Commonest label → fine-tuned model", "Confusion of labels", "held-out accuracy"):
        assert words in page


# ------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def published(full: Recipe, adapted: Recipe) -> dict[str, Any]:
    return {r.run.name: export(r.run.dir.root, quiet(), vllm=None) for r in (full, adapted)}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_an_export_is_loaded_by_transformers_and_says_what_was_trained(
    name: str, published: dict[str, Any], full: Recipe, adapted: Recipe
) -> None:
    manifest, recipe = published[name], full if name == "full" else adapted
    assert manifest.model["architecture"] == "Gemma3TextForSequenceClassification"
    assert manifest.model["labels"] == NAMES
    expected = {check.name for check in checks.LABELS} | ({"adapter_effect"} if name == "lora" else set())
    assert {key for key, said in manifest.content["checks"].items() if said.get("passed")} == expected
    model, info = AutoModelForSequenceClassification.from_pretrained(manifest.folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id["fr"] == 3
    tokenizer = AutoTokenizer.from_pretrained(manifest.folder)
    trained = Trained.of(recipe.run.dir.root).model(torch.device("cpu"), torch.float32)
    texts = ["ninety-nine", "vingt et un", "dreihundertvier", "veinte mil"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    together = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = [trained(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
    proof = manifest.content["proof"]
    said = model(input_ids=torch.tensor([tokenizer(proof["input"])["input_ids"]])).logits[0].softmax(-1)
    assert list(proof["probabilities"]) == NAMES
    np.testing.assert_allclose(list(proof["probabilities"].values()), said.detach(), atol=1e-4)
    assert not os.path.exists(os.path.join(manifest.folder, "generation_config.json"))


def spoil_head(folder: str) -> None:
    tensors = load_file(f"{folder}/model.safetensors")
    tensors["score.weight"] = tensors["score.weight"].flip(0).contiguous()
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def drop_head(folder: str) -> None:
    tensors = load_file(f"{folder}/model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def swap_labels(folder: str) -> None:
    content = json.loads(Path(folder, "config.json").read_text())
    content["id2label"] = {"0": "en", "1": "de", "2": "es", "3": "fr"}
    Path(folder, "config.json").write_text(json.dumps(content))


def other_tokens(folder: str) -> None:
    content = json.loads(Path(folder, "tokenizer.json").read_text())
    content["post_processor"] = None  # no <bos>
    Path(folder, "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "name"),
    [(spoil_head, "weights_trained"), (drop_head, "keys"), (swap_labels, "config"), (other_tokens, "text_tokens")],
)
def test_the_gate_names_a_planted_fault(
    damage: Callable[[str], None], name: str, published: dict[str, Any], full: Recipe, tmp_path: Path
) -> None:
    folder = str(shutil.copytree(published["full"].folder, tmp_path / "copy"))
    damage(folder)
    case = Case(Trained.of(full.run.dir.root), folder)
    with pytest.raises(ExportError, match=f"check '{name}' failed"):
        gate.examine(case, checks.wanted(case))
    if damage is spoil_head:
        with pytest.raises(ExportError, match="differs from the trained model by"):
            checks.logits_transformers(case)


def test_a_classifier_is_no_adapter_and_not_vllms_and_gives_no_text(
    published: dict[str, Any], full: Recipe, adapted: Recipe
) -> None:
    with pytest.raises(ExportError, match="trained a classifier, whose last layer is no part of an adapter"):
        export(adapted.run.dir.root, quiet(), adapter_only=True)
    with pytest.raises(ExportError, match="a classifier is served by transformers"):
        export(full.run.dir.root, quiet(), vllm=True)
    with pytest.raises(ServeError, match="'full' is a classifier, whose base has nothing that tells labels apart"):
        serving_models.load([published["full"].folder], base=True)
    with pytest.raises(ServeError, match="gives probabilities of labels, and only runs and folders are judged"):
        evaluate("http://127.0.0.1:9", quiet(), recipe=full.run.dir.recipe)
    for location in (full.run.dir.root, published["lora"].folder):
        with pytest.raises(ModelError, match="is a classifier of de, en, es …, which gives probabilities of labels"):
            find(Target.of(location))


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_bases_with_a_tower_or_a_last_layer_of_their_own_export_without_it(
    family: str, demo: DemoPaths, recipe_for: Callable[..., Recipe], tmp_path: Path
) -> None:
    words = len(AutoTokenizer.from_pretrained(demo.base))
    base = models.write(tmp_path / "base", family, torch.float32, shards="100KB", vocab_size=words)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(os.path.join(demo.base, name), base)
    recipe = recipe_for(family, f"model.path={base}", "train.max_steps=3")
    launch.train(recipe, quiet())
    manifest = export(recipe.run.dir.root, quiet())
    assert len(list(Path(manifest.folder).glob("*.safetensors"))) > 1
    model, info = AutoModelForSequenceClassification.from_pretrained(manifest.folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(manifest.folder)
    assert model.config.get_text_config().pad_token_id == tokenizer.pad_token_id
    trained = Trained.of(recipe.run.dir.root).model(torch.device("cpu"), torch.float32)
    texts = ["ninety-nine", "dreihundertvier und mehr"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    together = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = [trained(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
