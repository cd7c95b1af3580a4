"""The gate with vLLM itself: it loads a merged export, and an adapter beside its base, and answers as trained."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from ray_ft import recipe as recipes
from ray_ft.demo import PROMPT, DemoPaths
from ray_ft.export import export, lora
from ray_ft.export.vllm_probe import _Ignored
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.view import View
from tests.integration.servers import command_line

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.serve, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trained(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    rows = {"format": "translation", "prompt": PROMPT}
    optimizer = {"lr": 0.02}
    recipe = recipes.parse(
        {
            "run": {"name": "gate", "storage": str(tmp_path_factory.mktemp("runs"))},
            "model": {"path": demo.base, "adapter": {"name": "rslora", "rank": 4}},
            "data": {"train": [{"path": list(demo.train), **rows}], "seq_len": 96},
            "train": {"strategy": "none", "workers": 0, "device": "cpu", "global_batch": 8, "micro_batch": 4,
                      "max_steps": 5, "optimizer": optimizer},
        }
    )  # fmt: skip
    assert launch.train(recipe, View(Console(quiet=True))).complete
    return recipe


def test_vllm_answers_by_a_merged_export_as_the_trained_model_does(trained: Recipe) -> None:
    manifest = export(trained.run.dir.root, View(Console(quiet=True)), vllm=True)
    measured = manifest.content["checks"]["logits_vllm"]
    assert measured["passed"] and measured["rows"] == 4
    assert 0 < measured["difference_rms"] < 1e-5 < measured["tolerance_rms"] == 1e-4
    assert manifest.content["checks"]["adapter_effect"]["change_rms"] > 0.01
    assert not [process for process in psutil.Process().children() if "vllm_probe" in command_line(process)]


def test_vllm_answers_with_an_adapter_beside_its_base(trained: Recipe) -> None:
    manifest = export(trained.run.dir.root, View(Console(quiet=True)), adapter_only=True, vllm=True)
    assert manifest.folder == trained.run.dir.adapter
    measured = manifest.content["checks"]["logits_vllm"]
    assert measured["passed"] and 0 < measured["difference_rms"] < 1e-5
    assert json.loads(Path(manifest.folder, lora.CONFIG).read_text())["use_rslora"] is True


@pytest.mark.parametrize("mapped", [False, True])
def test_names_that_vllm_would_pass_over_are_found(mapped: bool) -> None:
    """On vLLM's own classes: layers that it fuses are named by their parts, and vision models' under other names."""
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
    from vllm.model_executor.models.utils import WeightsMapper

    class Model(torch.nn.Module):
        packed_modules_mapping = Gemma3ForCausalLM.packed_modules_mapping

    class Leaf(BaseLayerWithLoRA):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    model, prefix = Model(), "language_model.model" if mapped else "model"
    if mapped:
        # As gemma3_mm has it.
        prefixes = {"model.language_model.": "language_model.model."}
        model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=prefixes)
    at: torch.nn.Module = model
    for part in f"{prefix}.layers.0".split("."):
        at.add_module(part, torch.nn.Module())
        at = getattr(at, part)
    for leaf in ("qkv_proj", "o_proj"):
        at.add_module(leaf, Leaf())
    theirs = "base_model.model.model.language_model" if mapped else "base_model.model.model"
    known = [f"{theirs}.layers.0.{leaf}.lora_A.weight" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    lost = [f"{theirs}.layers.1.q_proj.lora_A.weight", "base_model.model.other.layers.0.q_proj.lora_B.weight"]
    assert _Ignored([*known, *lost])(model) == lost
