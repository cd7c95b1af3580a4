"""The recipes that ship: each parses, is planned, and wraps the true model at its real size as the plan says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore

from ray_ft import recipe as recipes
from ray_ft.model.loss import LossModel, decoder_layers
from ray_ft.plan import shapes
from ray_ft.plan.cut import per_rank_parameter_bytes
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout
from ray_ft.strategy.deepspeed import Zero
from ray_ft.strategy.fsdp import FSDP
from ray_ft.tune.space import check

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
GEMMA = [file for file in FILES if file.name.startswith("gemma3_")]
SWEEPS = [file for file in FILES if file.stem.endswith("_sweep")]
PER_NODE = 8


def commands(file: Path) -> list[list[str]]:
    """The overrides of each `ray-ft train` or `ray-ft tune` command in a recipe's comments."""
    found = re.findall(r"^# ray-ft (?:train|tune) (\S+)(.*)$", file.read_text(), re.MULTILINE)
    assert {path for path, _ in found} == {f"configs/{file.name}"}
    return [rest.split("(")[0].split() for _, rest in found]


WAYS = [(file, overrides) for file in GEMMA for overrides in commands(file)]


def ways(*strategies: str) -> list[Any]:
    return [
        pytest.param(file, overrides, id=" ".join([file.stem, *overrides]))
        for file, overrides in WAYS
        if recipes.load(str(file), overrides).train.strategy in strategies
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_its_command_on_the_first_line_and_parses(file: Path) -> None:
    verb = "tune" if file in SWEEPS else "train"
    assert file.read_text().startswith(f"# ray-ft {verb} configs/{file.name}")
    for overrides in commands(file):
        recipes.load(str(file), overrides)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_holds_only_what_differs_from_the_defaults(file: Path) -> None:
    def repeated(given: object, default: object, at: str) -> Iterator[str]:
        if isinstance(given, dict) and isinstance(default, dict):
            for key, value in given.items():
                yield from repeated(value, default.get(key), f"{at}.{key}")
        elif given == default:
            yield at

    content = yaml.safe_load(file.read_text())
    found = set(repeated(content.get("train", {}), recipes.Train().model_dump(mode="json"), "train"))
    if "tune" in content:
        defaults = {name: field.default for name, field in recipes.Tune.model_fields.items() if name != "space"}
        found |= set(repeated(content["tune"], defaults, "tune"))
    looked_for = {"train.strategy", "train.workers", "train.global_batch", "train.optimizer.lr"}
    assert not found - looked_for  # what a reader looks for is said in any case


def test_the_seeds_settings_are_those_of_the_27b_recipes() -> None:
    for name in ("fsdp", "zero3", "full_1gpu"):
        recipe = recipes.load(str(FOLDER / f"gemma3_27b_{name}.yaml"))
        assert (recipe.train.optimizer.name, recipe.train.optimizer.lr) == ("adafactor", 1e-4)
        assert (recipe.train.global_batch, recipe.data.seq_len) == (16, 1024)
        assert "input_embeddings" in recipe.model.freeze


def test_sweeps_are_those_and_their_spaces_hold() -> None:
    assert {file.stem for file in SWEEPS} == {"gemma3_4b_lora_sweep", "gemma3_27b_lora_sweep", "quickstart_sweep"}
    for file in FILES:
        recipe = recipes.load(str(file))
        assert (recipe.tune is not None) == (file in SWEEPS)
        if recipe.tune is None:
            continue
        space = check(recipe)
        for number in range(recipe.tune.wanted or 0):
            one = recipes.parse(space.apply(space.draw(number)))
            if one.model.adapter is not None:
                assert one.model.adapter.alpha == 2 * one.model.adapter.rank


@pytest.mark.parametrize(
    ("name", "gpus", "at_once"), [("gemma3_4b_lora_sweep", 8, 4), ("gemma3_27b_lora_sweep", 16, 4)]
)
def test_sweeps_run_as_many_trials_at_once_as_they_say(name: str, gpus: int, at_once: int) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    train = recipes.load(str(FOLDER / f"{name}.yaml")).train
    words = {2: "two", 4: "four"}
    assert f"on {gpus} GPUs of 80 GB {words[at_once]} trials at once, of {words[train.world_size]} GPUs each" in text
    assert train.world_size * at_once == gpus


# ------------------------------------------------------------------------------------------------- at its real size


def true_model(recipe: Recipe) -> tuple[Any, int, int]:
    """(the model on the meta device as training has it, its elements, bytes that the plan expects on the last rank)."""
    config = shapes.find_config(recipe.model.path)
    model, _ = shapes.build(config, recipe, torch.bfloat16)
    found = shapes.read(model, recipe, torch.bfloat16)
    world = recipe.train.world_size
    return model, found.total, per_rank_parameter_bytes(found, recipe.train, world - 1, nodes(recipe))


def nodes(recipe: Recipe) -> int:
    return max(recipe.train.world_size // PER_NODE, 1)


def last_rank(recipe: Recipe) -> Layout:
    world = recipe.train.world_size
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    return Layout(world - 1, world, torch.device("cpu"), torch.bfloat16, nodes(recipe))


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("file", "overrides"), ways("fsdp"))
@pytest.mark.usefixtures("alone")
def test_fsdp_wraps_the_true_model_as_the_plan_says(file: Path, overrides: list[str]) -> None:
    recipe = recipes.load(str(file), overrides)
    model, total, expected = true_model(recipe)
    strategy = FSDP(last_rank(recipe), recipe.train.fsdp)
    strategy.wrap(LossModel(model, recipe.train.loss_chunk), decoder_layers(model))
    spans = strategy.spans()
    assert sum(span.numel for span in spans.values()) == total
    assert sum(span.data.numel() * span.data.element_size() for span in spans.values()) == expected
    assert all(span.data.is_meta for span in spans.values())


@pytest.mark.slow
@pytest.mark.parametrize(("file", "overrides"), ways("zero3"))
def test_zero3_partitions_the_true_model_as_the_plan_says(file: Path, overrides: list[str]) -> None:
    """In a process of its own: DeepSpeed changes torch for the whole process, and the partition takes 7 GB."""
    code = f"import test_configs; test_configs.partition({str(file)!r}, {overrides!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    held, expected, elements, total, peak = map(int, done.stdout.split("\n")[-2].split())
    assert held == expected
    assert elements == total
    # The partition, the largest parameter (embeddings) as a whole, one copy of it on its way, and the libraries.
    assert peak < held + 3 * 2 * 262_208 * 5376 + 1.5 * 2**30


def partition(file: str, overrides: list[str]) -> None:
    """Prints (bytes held, bytes expected, elements of the whole, elements of the model, peak resident bytes)."""
    import resource

    recipe = recipes.load(file, overrides)
    model, total, expected = true_model(recipe)
    layout = last_rank(recipe)
    module = LossModel(model, recipe.train.loss_chunk)
    Zero(layout, recipe).partition(module, decoder_layers(model))
    parameters = list(module.parameters())
    held = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(held, expected, sum(p.ds_numel for p in parameters), total, peak)


def test_the_plan_notices_a_parameter_that_is_cut_otherwise() -> None:  # else the equalities above could be luck
    recipe = recipes.load(str(FOLDER / "gemma3_27b_fsdp.yaml"))
    model, _, expected = true_model(recipe)
    model.get_decoder().layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.get_decoder().layers[0].mlp.gate_proj.to(torch.bfloat16)
    found = shapes.read(model, recipe, torch.bfloat16)
    assert per_rank_parameter_bytes(found, recipe.train, 7) == expected - 21504 // 8 * 5376 * 2
