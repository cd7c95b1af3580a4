"""The gate: each check alone on a folder, planted faults refused by name, and what a failed export leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ray_ft import artifacts, paths
from ray_ft.data.render import load_tokenizer
from ray_ft.demo import DemoPaths
from ray_ft.errors import ExportError
from ray_ft.export import checks, export, folder, gate, lora, vllm_process, weights
from ray_ft.export.case import Case
from ray_ft.export.checks import text
from ray_ft.export.reference import Distance, Tolerance
from ray_ft.export.vllm_process import Vllm
from ray_ft.model import load
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.trained import Trained
from ray_ft.view import View


def quiet() -> View:
    return View(Console(quiet=True))


@pytest.fixture(scope="module")
def base(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """The demo with its base in several files."""
    made = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(demo.base, made, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(demo.base).save_pretrained(made, max_shard_size="60KB")
    return DemoPaths(demo.folder, str(made), demo.train, demo.heldout)


def trained(base: DemoPaths, storage: Path, name: str, *overrides: str) -> Recipe:
    options = (f"run.name={name}", "data.eval=[]", "train.max_steps=4", "train.optimizer.lr=0.02", *overrides)
    recipe = recipe_of(base, storage, *options)
    assert launch.train(recipe, quiet()).complete
    return recipe


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def full(base: DemoPaths, storage: Path) -> Recipe:
    return trained(base, storage, "full")


@pytest.fixture(scope="module")
def adapted(base: DemoPaths, storage: Path) -> Recipe:
    return trained(base, storage, "lora", 'model.adapter={"rank": 4}')


@pytest.fixture(scope="module")
def published(full: Recipe, adapted: Recipe) -> dict[str, str]:
    """Export folders by kind: of a full fine-tune, of one with the adapter merged, of the adapter alone."""
    runs = [("full", full, {}), ("merged", adapted, {}), ("adapter", adapted, {"adapter_only": True})]
    return {kind: export(recipe.run.dir.root, quiet(), vllm=False, **options).folder for kind, recipe, options in runs}


CHECKS = {"full": checks.MODEL, "merged": checks.MERGED, "adapter": checks.ADAPTER}


@pytest.fixture
def case(published: dict[str, str], full: Recipe, adapted: Recipe, tmp_path: Path) -> Callable[[str], Case]:
    """A copy of an export that a test may damage, before the gate."""

    def make(kind: str) -> Case:
        copy = shutil.copytree(published[kind], tmp_path / kind)
        return Case(Trained.of((full if kind == "full" else adapted).run.dir.root), str(copy))

    return make


def change(case: Case, file: str | None, edit: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    """Rewrite one file's tensors."""
    file = file or sorted(case.found)[0]
    path = os.path.join(case.folder, file)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return file


def layer(case: Case, number: int, what: str = "mlp.up_proj") -> tuple[str, str]:
    """(File, key) of a layer's weight."""
    key = f"model.layers.{number}.{what}.weight"
    return next(file for file, entries in case.found.items() if key in entries), key


def fresh(case: Case) -> Case:
    return Case(case.trained, case.folder, case.vllm)


# ------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("kind", CHECKS)
def test_every_check_has_a_name_and_says_what_it_measured(kind: str, published: dict[str, str]) -> None:
    content = paths.read_json(os.path.join(published[kind], artifacts.MANIFEST))
    assert content["format"] == 2 and content["kind"] == ("adapter" if kind == "adapter" else "model")
    assert list(content["checks"]) == [check.name for check in CHECKS[kind]]
    for name, measured in content["checks"].items():
        if name == "logits_vllm":
            assert measured == {"left_out": "not asked for (--no-vllm)"}
        elif name != "base":  # its own test
            assert measured["passed"], name
    logits = content["checks"]["logits_transformers"]
    assert logits["rows"] == 4 and logits["difference_rms"] <= logits["tolerance_rms"] == 1e-4
    card = Path(published[kind], "README.md").read_text()
    assert "- logits_vllm: left out: not asked for" in card and "- keys: passed" in card
    assert all(
        content["files"][name]["bytes"] == Path(published[kind], name).stat().st_size for name in content["files"]
    )
    assert set(content["files"]) == set(os.listdir(published[kind])) - {artifacts.MANIFEST}


def test_the_manifest_proves_what_the_trained_weights_answer(published: dict[str, str], full: Recipe) -> None:
    proof = paths.read_json(os.path.join(published["full"], artifacts.MANIFEST))["proof"]
    ids = torch.tensor(proof["token_ids"])
    assert 2 <= len(ids) <= 128 and len(proof["logprobs"]) == len(ids) - 1
    live = Trained.of(full.run.dir.root).model(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        said = torch.log_softmax(live(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(proof["logprobs"]), said, rtol=0, atol=1e-5)
    assert all(round(value, 5) == value for value in proof["logprobs"])


def test_rows_are_rendered_from_packed_ones_where_the_raw_data_is_gone(full: Recipe, tmp_path: Path) -> None:
    run = Path(shutil.copytree(full.run.dir.root, tmp_path / "run"))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("/train/part-", "/gone/part-"))
    origin, samples = text.real_samples(Trained.of(str(run)))
    assert origin == "prepared rows" and len(samples) > 4
    assert all(sample.answer for sample in samples)
    assert text.real_samples(Trained.of(full.run.dir.root))[0] == "data.train"


def test_another_base_under_the_same_name_is_refused(case: Callable[[str], Case], tmp_path: Path) -> None:
    one = case("merged")
    folder = Path(shutil.copytree(one.trained.base, tmp_path / "base"))
    state = {**one.trained.found.state, load.FINGERPRINT: load.fingerprint(one.trained.base)}
    found = dataclasses.replace(one.trained.found, state=state)
    one = Case(dataclasses.replace(one.trained, base=str(folder), found=found), one.folder)
    assert checks.files.base(one)["passed"]  # the same weights in another place
    file, key = layer(one, 1)
    tensors = load_file(folder / file)
    tensors[key].mul_(1.001)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"^check 'base' failed: the weights in .* are not those"):
        gate.examine(one, checks.MERGED)
    older = {name: value for name, value in state.items() if name != load.FINGERPRINT}
    one = Case(dataclasses.replace(one.trained, found=dataclasses.replace(found, state=older)), one.folder)
    assert "keeps no fingerprint" in checks.files.base(one)["left_out"]


# --------------------------------------------------------------------------------------------------- planted faults


def missing_key(case: Case) -> None:
    change(case, None, lambda tensors: tensors.pop(next(iter(tensors))))


def one_more(case: Case) -> None:
    change(case, None, lambda tensors: tensors.update(extra=torch.zeros(2)))


def swapped_files(case: Case) -> None:
    one, other = sorted(case.found)[:2]
    os.rename(os.path.join(case.folder, one), os.path.join(case.folder, "kept"))
    os.rename(os.path.join(case.folder, other), os.path.join(case.folder, one))
    os.rename(os.path.join(case.folder, "kept"), os.path.join(case.folder, other))


def moved_tensor(case: Case) -> None:
    one, other = sorted(case.found)[:2]
    taken: dict[str, torch.Tensor] = {}
    change(case, one, lambda tensors: taken.update(dict([tensors.popitem()])))
    change(case, other, lambda tensors: tensors.update(taken))


def swapped_layers(case: Case) -> None:
    """Two layers' weights in each other's file, under each other's name."""
    (one, first), (other, second) = layer(case, 0), layer(case, 1)
    assert one != other
    a, b = (load_file(os.path.join(case.folder, file)) for file in (one, other))
    a[first], b[second] = b[second].clone(), a[first].clone()
    save_file(a, os.path.join(case.folder, one), metadata={"format": "pt"})
    save_file(b, os.path.join(case.folder, other), metadata={"format": "pt"})


def damaged_file(case: Case) -> None:
    path = Path(case.folder, sorted(case.found)[0])
    path.write_bytes(path.read_bytes()[:-8])


def transposed(case: Case) -> None:
    file, key = layer(case, 1)
    change(case, file, lambda tensors: tensors.update({key: tensors[key].T.contiguous()}))


def half(case: Case) -> None:
    change(case, None, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))


def not_a_number(case: Case) -> None:
    file, key = layer(case, 1)
    change(case, file, lambda tensors: tensors[key][0].fill_(float("nan")))


def infinite(case: Case) -> None:
    change(case, None, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("inf")))


def untied_copy(case: Case) -> None:
    file = next(file for file, entries in case.found.items() if "model.embed_tokens.weight" in entries)
    change(case, file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


def untied_config(case: Case) -> None:
    edit_json(case, "config.json", tie_word_embeddings=False)


def other_rope(case: Case) -> None:
    content = paths.read_json(os.path.join(case.folder, "config.json"))["rope_parameters"]
    edit_json(
        case, "config.json", rope_parameters={**content, "full_attention": {"rope_type": "default", "rope_theta": 7}}
    )


def other_window(case: Case) -> None:
    """Longer than the rows that are compared, so that no answer of theirs changes."""
    edit_json(case, "config.json", sliding_window=4096)


def lost_stop_id(case: Case) -> None:
    edit_json(case, "generation_config.json", eos_token_id=[1])


def edit_json(case: Case, file: str, **values: Any) -> None:
    path = Path(case.folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def wrong_template(case: Case) -> None:
    path = Path(case.folder, "chat_template.jinja")
    path.write_text(path.read_text().replace("add_generation_prompt", "true"))


def other_tokenizer(case: Case) -> None:
    path = Path(case.folder, "tokenizer.json")
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    path.write_text(json.dumps(content))


def the_base(case: Case) -> None:
    for file in case.found:
        shutil.copy(os.path.join(case.trained.base, file), case.folder)


def not_merged(case: Case) -> None:
    """One layer is still the base's."""
    file, key = layer(case, 1)
    kept = load_file(os.path.join(case.trained.base, file))[key]
    change(case, file, lambda tensors: tensors.update({key: kept}))


def swapped_adapters(case: Case) -> None:
    one, other = (f"base_model.model.model.layers.{number}.mlp.up_proj.lora_B.weight" for number in (0, 1))
    change(case, None, lambda t: t.update({one: t[other].clone(), other: t[one].clone()}))


def untrained_changed(case: Case) -> None:
    file, key = layer(case, 0, "input_layernorm")
    change(case, file, lambda tensors: tensors[key].add_(1))


def zero_adapter(case: Case) -> None:
    change(case, None, lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if ".lora_B." in key])


def other_names(case: Case) -> None:
    """As a loader that looks for other names would see it."""
    renamed = {"base_model.model.": "base_model.model.language_model."}
    change(case, None, lambda t: [t.update({key.replace(*i): t.pop(key)}) for key in list(t) for i in renamed.items()])


def wrong_scale(case: Case) -> None:
    edit_json(case, lora.CONFIG, lora_alpha=16)


FAULTS: list[tuple[str, Callable[[Case], None], str, str]] = [
    ("full", missing_key, "keys", "missing: model"),
    ("full", one_more, "keys", "more than the base has: extra"),
    ("full", swapped_files, "keys", "in another file than the base's"),
    ("full", moved_tensor, "keys", "in another file than the base's"),
    ("full", swapped_layers, "weights_trained", r"mlp\.up_proj\.weight in .* is not what step 4 has trained"),
    ("full", other_rope, "config", "config.json differs from the base's in rope_parameters"),
    ("full", other_window, "config", "config.json differs from the base's in sliding_window"),
    ("full", damaged_file, "keys", "is damaged"),
    ("full", transposed, "shapes", r"has shape \[32, 128\], \[128, 32\] is right"),
    ("full", half, "dtype", "has element type F16, F32 is right"),
    ("full", not_a_number, "finite", r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"),
    ("full", infinite, "finite", "holds values that are not finite"),
    ("full", untied_copy, "tied_head", r"lm_head\.weight is stored though it is tied"),
    ("full", untied_config, "tied_head", "tie_word_embeddings False, the base's has True"),
    ("full", lost_stop_id, "stop_ids", r"eos_token_id \[1\] and lacks 5"),
    ("full", wrong_template, "chat_template", "renders a row as"),
    ("full", other_tokenizer, "chat_template", "other tokens of a row"),
    ("full", the_base, "weights_changed", "no tensor differs from the base"),
    ("merged", the_base, "weights_changed", "no tensor differs from the base"),
    ("merged", untrained_changed, "weights_changed", "input_layernorm.weight differs from the base's"),
    ("merged", swapped_layers, "weights_trained", r"mlp\.up_proj\.weight in .* is not what step 4 has trained"),
    ("merged", not_merged, "weights_trained", r"layers\.1\.mlp\.up_proj\.weight in .* is not what step 4 has trained"),
    ("adapter", zero_adapter, "adapter_effect", "B is zero in all its 14 layers"),
    ("adapter", other_names, "keys", "missing: base_model.model.model.layers"),
    ("adapter", missing_key, "keys", "missing: base_model.model.model.layers"),
    ("adapter", half, "dtype", "has element type F16, F32 is right"),
    ("adapter", infinite, "finite", "holds values that are not finite"),
    ("adapter", swapped_adapters, "weights_trained", r"lora_B\.weight in .* is not what step 4 has trained"),
    ("adapter", wrong_scale, "logits_transformers", "differs from the trained model"),
]


@pytest.mark.parametrize(("kind", "fault", "name", "message"), FAULTS, ids=[f"{f[0]}-{f[1].__name__}" for f in FAULTS])
def test_a_planted_fault_is_refused_by_name(
    kind: str, fault: Callable[[Case], None], name: str, message: str, case: Callable[[str], Case]
) -> None:
    damaged = case(kind)
    fault(damaged)
    with pytest.raises(ExportError, match=f"^check '{name}' failed: .*{message}"):
        gate.examine(fresh(damaged), CHECKS[kind])
    alone = next(check for check in CHECKS[kind] if check.name == name)
    with pytest.raises(ExportError, match=f"^check '{name}' failed: "):  # needs none of those before it
        alone(fresh(damaged))


def test_a_checkpoint_that_is_the_base_in_all_but_name(case: Callable[[str], Case], adapted: Recipe) -> None:
    """Within the tolerance, and yet no nearer to the trained model than to its base."""
    one = case("merged")
    effect = one.reference.effect
    assert effect is not None
    found = Distance(effect.rms * 0.6, effect.rms * 0.6)
    one.reference.__dict__["distance"] = lambda answers: found
    one.__class__ = type("Wide", (Case,), {"tolerance": Tolerance(1e3)})
    with pytest.raises(ExportError, match=r"check 'logits_transformers' failed: .*may as well be the base model"):
        checks.answers.logits_transformers(one)


def test_tolerances_are_those_of_the_precision() -> None:
    assert Tolerance.of(torch.float32, 62).rms == 1e-4
    assert Tolerance.of(torch.bfloat16, 2).rms == pytest.approx(0.0271, abs=1e-4)
    assert Tolerance.of(torch.bfloat16, 62).rms == pytest.approx(0.0898, abs=1e-4)
    assert not Tolerance(1e-4).holds(Distance(float("nan"), 0)) and not Tolerance(1e-4).holds(Distance(0, 0.01))


@pytest.mark.parametrize(
    ("kind", "fault"), [("full", swapped_layers), ("merged", swapped_layers), ("full", other_rope)]
)
def test_other_answers_are_refused_whatever_the_files_say(
    kind: str, fault: Callable[[Case], None], case: Callable[[str], Case]
) -> None:
    damaged = case(kind)
    fault(damaged)
    with pytest.raises(ExportError, match=r"^check 'logits_transformers' failed: .*differs from the trained model"):
        checks.answers.logits_transformers(fresh(damaged))


def test_what_rounding_hides_from_the_answers_is_seen_in_the_weights(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that keeps the base's weights, under the tolerance of bfloat16."""
    one = case("full")
    file, key = layer(one, 1, "self_attn.k_norm")
    kept = load_file(os.path.join(one.trained.base, file))[key]
    change(one, file, lambda tensors: tensors.update({key: kept}))
    monkeypatch.setattr(Case, "tolerance", Tolerance.of(torch.bfloat16, 2))
    assert checks.answers.logits_transformers(fresh(one))["passed"]
    with pytest.raises(ExportError, match=r"^check 'weights_trained' failed"):
        checks.files.weights_trained(fresh(one))


# ---------------------------------------------------------------------------------------------- what vLLM would say


class Said:
    """Stands in for the process, with what vLLM would have answered."""

    asked = False

    def __init__(self, **result: Any) -> None:
        self.result = result

    def ask(self, folder: str, documents: list[list[int]]) -> None:
        self.asked = True

    def answer(self) -> dict[str, Any]:
        return self.result


def said(case: Case, off: float = 0.0) -> list[list[list[list[float]]]]:
    """The reference's own log-probabilities, one token a position, moved."""
    reference = case.reference
    found = []
    for ids, logits in zip(reference.documents, reference.logits, strict=True):
        logprobs = torch.log_softmax(logits, -1)
        found.append([[[token, float(row[token]) + off]] for row, token in zip(logprobs, ids[1:], strict=False)])
    return found


def test_vllms_log_probabilities_are_compared(case: Callable[[str], Case]) -> None:
    one = case("full")
    one.vllm = Said(answers=said(one), without=None, ignored=[])  # type: ignore[assignment]
    assert checks.answers.logits_vllm(one)["difference_rms"] < 1e-6
    one.vllm = Said(answers=said(one, 0.01), without=None, ignored=[])  # type: ignore[assignment]
    with pytest.raises(ExportError, match=r"check 'logits_vllm' failed: .*differs from the trained model"):
        checks.answers.logits_vllm(one)


def test_an_adapter_that_vllm_passes_over_is_refused(case: Callable[[str], Case]) -> None:
    one = case("adapter")
    one.vllm = Said(answers=said(one), without=said(one), ignored=[])  # type: ignore[assignment]
    with pytest.raises(ExportError, match=r"check 'logits_vllm' failed: .*exactly as without it"):
        checks.answers.logits_vllm(one)
    one.vllm = Said(answers=said(one), without=said(one, 0.1), ignored=["base_model.model.other"])  # type: ignore[assignment]
    with pytest.raises(ExportError, match=r"check 'logits_vllm' failed: vLLM has no layer for 1 of the adapter's"):
        checks.answers.logits_vllm(one)


def test_vllm_is_left_out_with_the_reason_or_required(
    full: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(shutil.copytree(full.run.dir.root, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    monkeypatch.setattr(vllm_process, "OVERHEAD", 1 << 60)
    with pytest.raises(ExportError, match=r"check 'logits_vllm' failed: vLLM cannot be asked: it needs .* of memory"):
        export(run, quiet(), vllm=True)
    left_out = export(run, quiet()).content["checks"]["logits_vllm"]["left_out"]
    assert left_out.startswith("it needs ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert vllm_process.obstacle(Trained.of(run)) == "vLLM is not installed"


def test_a_process_that_fails_says_why_and_leaves_nothing(
    full: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(shutil.copytree(full.run.dir.root, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    (tmp_path / "vllm.py").write_text("raise ImportError('no such kernel')\n")  # found before the real one
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    one = Trained.of(run)
    with Vllm(one) as process:
        process.ask(run, [[1, 2]])
        with pytest.raises(ExportError, match=r"(?s)vLLM ended with status 1:.*ImportError: no such kernel") as failure:
            process.answer()
    assert "--no-vllm" in str(failure.value)
    assert "no such kernel" in paths.read_text(paths.join(one.run.logs, vllm_process.LOG))
    with Vllm(one) as process:  # and one that is never asked
        pid = process._process.pid
    assert process._process.returncode is not None and not os.path.exists(f"/proc/{pid}")
    assert os.listdir(tmp_path / "scratch") == []


# --------------------------------------------------------------------------------------------- what a failure leaves


def test_a_failed_gate_leaves_the_earlier_export_and_nothing_else(
    full: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(shutil.copytree(full.run.dir.root, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    export(run, quiet(), vllm=False)
    before = {path.name: path.read_bytes() for path in Path(run, "export").iterdir()}
    there = sorted(os.listdir(run))
    right = weights.write

    def faulty(trained: Trained, made: str, plan: weights.Plan) -> None:
        right(trained, made, plan)
        not_a_number(Case(trained, made))

    monkeypatch.setattr(weights, "write", faulty)
    for target in (None, str(tmp_path / "elsewhere" / "export")):
        with pytest.raises(ExportError, match=r"^check 'finite' failed"):
            export(run, quiet(), target, vllm=False)
    assert {path.name: path.read_bytes() for path in Path(run, "export").iterdir()} == before
    assert sorted(os.listdir(run)) == there
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"notes.txt": "kept"}, "notes.txt"),
        ({"manifest.json": '{"name": "an extension"}', "app.js": ""}, "app.js, manifest.json"),
        ({"manifest.json": "no JSON"}, "manifest.json"),
        ({"manifest.json": '{"ray_ft": "0.1", "files": {"config.json": {}}}', "config.json": "", "mine": ""}, "mine"),
    ],
)
def test_what_no_export_has_written_is_not_replaced(
    files: dict[str, str], named: str, full: Recipe, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name, content in files.items():
        (target / name).write_text(content)
    with pytest.raises(ExportError, match=rf"target holds {named}, which no export has put there"):
        export(full.run.dir.root, quiet(), str(target), vllm=False)
    assert {path.name: path.read_text() for path in target.iterdir()} == files


def test_a_target_that_cannot_be_written_is_an_error(full: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, message in (("file", "is no folder"), ("file/below", "cannot be written to")):
        with pytest.raises(ExportError, match=message):
            export(full.run.dir.root, quiet(), str(tmp_path / target), vllm=False)


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, target = tmp_path / "made", tmp_path / "export"
    for place in (made, target):
        place.mkdir()
        (place / "whose").write_text(place.name)
    right = os.rename

    def failing(source: str, to: str) -> None:
        if source == str(made):
            raise OSError("no space")
        right(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        folder._publish(str(made), str(target))
    assert (target / "whose").read_text() == "export"


def test_the_tokenizer_of_the_training_is_not_the_exports(case: Callable[[str], Case]) -> None:
    """A tokenizer kept under the folder's name would hide what changes there."""
    one = case("full")
    checks.text.chat_template(one)
    wrong_template(one)
    with pytest.raises(ExportError, match=r"check 'chat_template' failed"):
        checks.text.chat_template(one)
    assert load_tokenizer(one.trained.base).chat_template


def test_the_checks_of_a_merged_adapter_are_those_of_a_model_and_its_own() -> None:
    names = [check.name for check in checks.MERGED]
    assert names.index("adapter_effect") < names.index("weights_changed")
    assert set(names) == {*(check.name for check in checks.MODEL), "adapter_effect"}
    assert folder.wanted is checks.wanted
