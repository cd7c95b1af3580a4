"""A run with an adapter: what its checkpoint holds, and that its export is one plain model that answers like it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from ray_ft import artifacts, paths
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError, ExportError
from ray_ft.export import export, vllm_process
from ray_ft.export.reference import Tolerance
from ray_ft.model import adapter, quantize
from ray_ft.recipe import Recipe
from ray_ft.span import Span
from ray_ft.train import checkpoint, launch
from ray_ft.trained import Trained

IDS = torch.arange(6, 46)[None]
LAYERS = 14


class Quiet(launch.View):
    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


@pytest.fixture(scope="module")
def base(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """The demo with its base in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(demo.base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(demo.base).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return DemoPaths(demo.folder, str(folder), demo.train, demo.heldout)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def trained(base: DemoPaths, storage: Path, name: str, settings: dict[str, Any], *overrides: str) -> Recipe:
    options = (f"run.name={name}", "data.eval=[]", "train.max_steps=5", "train.optimizer.lr=0.02", *overrides)
    recipe = recipe_of(base, storage, f"model.adapter={json.dumps(settings)}", *options)
    assert launch.train(recipe, Quiet()).complete
    return recipe


@pytest.fixture(scope="module")
def lora(base: DemoPaths, storage: Path) -> Recipe:
    return trained(base, storage, "lora", {"rank": 4})


def files_of(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}


def copy_of(recipe: Recipe, to: Path) -> str:
    shutil.copytree(recipe.run.dir.root, to)
    return str(to)


CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"name": "lora", "rank": 4, "dropout": 0.1}, ()),
    ({"name": "rslora", "rank": 4, "target_modules": ["*q_proj", "*layers.1.mlp.up_proj"]}, ()),
    ({"name": "dora", "rank": 4}, ('model.unfreeze=["*input_layernorm*"]',)),
]


@pytest.mark.parametrize(("settings", "overrides"), CASES, ids=[case[0]["name"] for case in CASES])
def test_an_export_is_the_base_with_the_adapter_merged_into_it(
    settings: dict[str, Any], overrides: tuple[str, ...], base: DemoPaths, storage: Path
) -> None:
    recipe = trained(base, storage, f"{settings['name']}-case", settings, *overrides)
    targets = 3 if "target_modules" in settings else LAYERS
    found = Trained.of(recipe.run.dir.root)
    names = found.trained_names()
    own = {name for name in names if adapter.stored_name(name) is None}
    assert len(own) == targets * (3 if settings["name"] == "dora" else 2)
    assert len(names - own) == (2 if overrides else 0)
    stored = {key.split("/")[1] for key in checkpoint.index(found.found.location)}
    assert stored == names  # neither weights nor optimizer state of anything else

    manifest = export(recipe.run.dir.root, Quiet(), vllm=False)
    checks = manifest.content["checks"]
    assert checks["logits_transformers"]["difference_rms"] < 1e-5 < 1e-2 < checks["adapter_effect"]["change_rms"]

    before, after = files_of(base.base), files_of(manifest.folder)
    assert {file: set(tensors) for file, tensors in after.items()} == {f: set(t) for f, t in before.items()}
    changed = {key for file, tensors in after.items() for key, t in tensors.items() if not t.equal(before[file][key])}
    expected = {f"{name.removesuffix(adapter.DOWN)}.weight" for name in own if name.endswith(adapter.DOWN)}
    assert changed == expected | (names - own)
    model = AutoModelForCausalLM.from_pretrained(manifest.folder).eval()
    live = found.model(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model(IDS).logits, live(IDS).logits, rtol=0, atol=1e-4)
    start = AutoModelForCausalLM.from_pretrained(base.base).eval()
    assert (model(IDS).logits - start(IDS).logits).abs().max() > 0.05


def test_training_resumes_from_an_adapters_checkpoint_as_if_nothing_happened(base: DemoPaths, storage: Path) -> None:
    options = ("train.max_steps=8", "train.schedule.name=constant", "train.checkpoint.every=4")
    whole = trained(base, storage, "whole", {"name": "dora", "rank": 2}, *options)
    cut = trained(base, storage, "cut", {"name": "dora", "rank": 2}, *options[1:], "train.max_steps=4")
    again = recipe_of(base, storage, *options, "run.name=cut", "data.eval=[]", "train.optimizer.lr=0.02")
    again = again.model_copy(update={"model": cut.model})
    assert launch.train(again, Quiet()).taken == 4
    tensors = []
    for recipe in (whole, again):
        found = Trained.of(recipe.run.dir.root)
        assert found.found.step == 8
        live = dict(found.model(torch.device("cpu"), torch.float32).named_parameters())
        tensors.append({name: live[name].detach() for name in found.trained_names()})
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


# ------------------------------------------------------------------------------------------------------------ gates


def rewritten(recipe: Recipe, to: Path, change: Any) -> str:
    """A copy of a run, its checkpoint's tensors passed through ``change(key, tensor)``; None leaves one out."""
    run = copy_of(recipe, to)
    found = Trained.of(run)
    tensors = {key: torch.empty(stored.shape) for key, stored in checkpoint.index(found.found.location).items()}
    checkpoint.restore(found.found.location, {key: Span.whole(tensor) for key, tensor in tensors.items()})
    kept = {key: new for key, tensor in tensors.items() if (new := change(key, tensor)) is not None}
    state = {key: value for key, value in found.found.state.items() if key not in ("format", "step")}
    folder = found.run.checkpoints
    paths.delete_dir(found.found.location)
    checkpoint.save(folder, found.found.step, {key: Span.whole(t) for key, t in kept.items()}, state, 0, 1)
    return run


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_changes_nothing_is_not_published(
    kind: str, base: DemoPaths, storage: Path, tmp_path: Path
) -> None:
    recipe = trained(base, storage, f"nothing-{kind}", {"name": kind, "rank": 2}, "train.max_steps=1")
    run = rewritten(recipe, tmp_path / "run", lambda key, t: t.zero_() if key.endswith(adapter.UP) else t)
    with pytest.raises(
        ExportError,
        match=r"check 'adapter_effect' failed: .* changes nothing after 1 steps: B is zero in all its 14 layers",
    ):
        export(run, Quiet(), vllm=False)
    assert not paths.exists(Trained.of(run).run.export)


def test_values_that_are_not_finite_are_not_published(lora: Recipe, tmp_path: Path) -> None:
    def poison(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if key.endswith("layers.1.mlp.up_proj" + adapter.UP) else tensor

    with pytest.raises(ExportError, match=r"check 'finite' failed: .*layers\.1\.mlp\.up_proj\.weight holds values"):
        export(rewritten(lora, tmp_path / "run", poison), Quiet(), vllm=False)


def test_a_wrong_merge_is_not_published(lora: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, right = copy_of(lora, tmp_path / "run"), adapter.merge
    monkeypatch.setattr(adapter, "merge", lambda w, a, b, m, s: right(w, a, b / 2, m, s))
    with pytest.raises(ExportError, match=r"check 'logits_transformers' failed: .* differs .* over 0\.0001"):
        export(run, Quiet(), vllm=False)
    # A tolerance that is too wide to see it, and next to nothing merged: the base model in all but name.
    monkeypatch.setattr(Tolerance, "of", lambda dtype, layers: Tolerance(1e3))
    monkeypatch.setattr(adapter, "merge", lambda w, a, b, m, s: right(w, a, -b / 1000, m, s))
    with pytest.raises(ExportError, match="this may as well be the base model"):
        export(run, Quiet(), vllm=False)
    assert not paths.exists(Trained.of(run).run.export)


def test_a_checkpoint_without_the_recipes_adapter_is_refused(lora: Recipe, tmp_path: Path) -> None:
    lost = "model.layers.0.self_attn.q_proj.lora_A"
    run = rewritten(lora, tmp_path / "less", lambda key, tensor: None if lost in key else tensor)
    with pytest.raises(CheckpointError, match=f"lacks model/{lost}"):
        Trained.of(run).model(torch.device("cpu"), torch.float32)
    run = copy_of(lora, tmp_path / "other")
    recipe = Path(run, "recipe.yaml")
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 2"))
    with pytest.raises(CheckpointError, match="has shape"):
        Trained.of(run).model(torch.device("cpu"), torch.float32)


def test_an_adapter_over_4_bits_is_merged_into_the_rounded_base(
    base: DemoPaths, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantize, "check", lambda device: None)  # the arithmetic is the same on a CPU …
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # … but for a layout of wide rows
    recipe = trained(base, storage, "qlora", {"rank": 4}, "model.quantize=nf4", "model.dtype=float32")
    manifest = export(recipe.run.dir.root, Quiet(), vllm=False)
    checks = manifest.content["checks"]
    assert checks["logits_transformers"]["difference_rms"] < 1e-5 < 1e-2 < checks["adapter_effect"]["change_rms"]
    rounded = AutoModelForCausalLM.from_pretrained(manifest.folder)
    start = AutoModelForCausalLM.from_pretrained(base.base)
    for name, parameter in rounded.named_parameters():
        assert ("proj" in name) == (not torch.equal(parameter, start.get_parameter(name))), name


# ------------------------------------------------------------------------------------------------ the adapter alone


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_an_adapter_alone_is_what_peft_reads_beside_the_base(
    name: str, base: DemoPaths, storage: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    recipe = trained(base, storage, f"alone-{name}", {"name": name, "rank": 4, "alpha": 12})
    run = recipe.run.dir.root
    if name == "dora":
        with pytest.raises(ExportError, match="vLLM serves no DoRA adapter") as failure:
            export(run, Quiet(), adapter_only=True)
        assert "--no-vllm" in str(failure.value)
    manifest = export(run, Quiet(), adapter_only=True, vllm=False)
    assert manifest.folder == recipe.run.dir.adapter and manifest.is_adapter
    assert manifest.model["rank"] == 4 and manifest.model["architecture"] == "Gemma3ForCausalLM"
    assert manifest.model["parameters"] == sum(t.numel() for f in files_of(base.base).values() for t in f.values())
    config = paths.read_json(paths.join(manifest.folder, "adapter_config.json"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12, base.base)
    assert (config["use_rslora"], config["use_dora"]) == (name == "rslora", name == "dora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.base), manifest.folder).eval()
    live = Trained.of(run).model(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model(IDS).logits, live(IDS).logits, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (model(IDS).logits - live(IDS).logits).abs().max() > 0.05


def test_an_adapter_alone_that_is_not_all_that_was_trained_is_refused(
    base: DemoPaths, storage: Path, lora: Recipe, tmp_path: Path
) -> None:
    whole = recipe_of(base, storage, "run.name=whole-model", "data.eval=[]", "train.max_steps=1")
    assert launch.train(whole, Quiet()).complete
    with pytest.raises(ExportError, match="the run has no adapter"):
        export(whole.run.dir.root, Quiet(), adapter_only=True, vllm=False)
    beside = trained(base, storage, "beside", {"rank": 2}, 'model.unfreeze=["*input_layernorm*"]', "train.max_steps=1")
    with pytest.raises(ExportError, match=r"model.unfreeze trained model\.layers\.0\.input_layernorm\.weight"):
        export(beside.run.dir.root, Quiet(), adapter_only=True, vllm=False)
    run = copy_of(lora, tmp_path / "rounded")
    recipe = Path(run, "recipe.yaml")
    recipe.write_text(recipe.read_text().replace("quantize: null", "quantize: nf4"))
    with pytest.raises(ExportError, match="beside a base rounded to 4 bits"):
        export(run, Quiet(), adapter_only=True, vllm=False)
    for failed in (whole.run.dir, beside.run.dir, artifacts.RunDir(run)):
        assert not paths.exists(failed.adapter)


# ---------------------------------------------------------------------------------------------------- vision models


def test_an_adapter_on_a_vision_model_is_merged_under_the_names_of_its_files(
    demo: DemoPaths, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vision"
    shutil.copytree(demo.base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    text = AutoModelForCausalLM.from_pretrained(demo.base).config.to_dict()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    base = DemoPaths(demo.folder, str(folder), demo.train, demo.heldout)
    recipe = trained(base, storage, "vision", {"rank": 4})
    manifest = export(recipe.run.dir.root, Quiet(), vllm=False)
    checks = manifest.content["checks"]
    assert checks["logits_transformers"]["difference_rms"] < 1e-5 < 1e-2 < checks["adapter_effect"]["change_rms"]
    (before,), (after,) = files_of(str(folder)).values(), files_of(manifest.folder).values()
    changed = {key for key, tensor in after.items() if not tensor.equal(before[key])}
    assert after.keys() == before.keys()
    assert len(changed) == LAYERS
    assert all(key.startswith("language_model.model.layers.") and key.endswith("_proj.weight") for key in changed)
    model = AutoModelForCausalLM.from_pretrained(manifest.folder).eval()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    live = Trained.of(recipe.run.dir.root).model(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model(IDS).logits, live(IDS).logits, rtol=0, atol=1e-4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchvision" else object())
    assert "torchvision" not in (vllm_process.obstacle(Trained.of(recipe.run.dir.root)) or "")
    monkeypatch.setattr("ray_ft.vllm_needs.SEEN_BY_PIL", ())
    assert "torchvision" in (vllm_process.obstacle(Trained.of(recipe.run.dir.root)) or "")


def test_a_tied_weight_that_the_base_stores_twice_is_exported_once(demo: DemoPaths, tmp_path: Path) -> None:
    """Else readers that take the second copy would answer with the base's output projection."""
    folder = tmp_path / "base"
    shutil.copytree(demo.base, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    twice = DemoPaths(demo.folder, str(folder), demo.train, demo.heldout)
    options = ("data.eval=[]", "train.max_steps=3", "train.optimizer.lr=0.02")
    recipe = recipe_of(twice, tmp_path / "runs", *options)
    assert launch.train(recipe, Quiet()).complete
    manifest = export(recipe.run.dir.root, Quiet(), vllm=False)
    [(_, exported)] = files_of(manifest.folder).items()
    assert exported.keys() == tensors.keys()
    assert not exported["model.embed_tokens.weight"].equal(tensors["model.embed_tokens.weight"])
