"""How much memory writing an export takes: no more than one shard and one layer, however many there are."""

from __future__ import annotations

import ctypes
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ray_ft import paths
from ray_ft.demo import DemoPaths
from ray_ft.export import lora, tensorfile, weights
from ray_ft.export.tensorfile import Reader
from ray_ft.model import adapter
from ray_ft.span import Span
from ray_ft.train import checkpoint
from ray_ft.trained import SECTION, Trained

MIB = 1 << 20
SHARD, LAYER = 40 * MIB, 13 * MIB  # bytes of the base below, at most
SLACK = 16 * MIB  # what libraries allocate at first use; a block of a checkpoint


def peak(call: Callable[[], Any]) -> int:
    """By how many bytes the process's memory grows at most while it runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed and glibc kept would be taken without growing
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def base(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """A base of 100 MiB in three files."""
    folder = tmp_path_factory.mktemp("large") / "base"
    shutil.copytree(demo.base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(demo.base)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 8
    config.layer_types = ["sliding_attention"] * 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=SHARD)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) >= 3 and max(sizes) <= SHARD + MIB and sum(sizes) > 2 * SHARD + LAYER
    return DemoPaths(demo.folder, str(folder), demo.train, demo.heldout)


def run_of(base: DemoPaths, storage: Path, *overrides: str) -> Trained:
    """A run with a checkpoint of random values, as if it had been trained."""
    recipe = recipe_of(base, storage, *overrides)
    tensors: dict[str, torch.Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(base.base)
    for name, parameter in model.named_parameters():
        if recipe.model.adapter is None:
            tensors[name] = parameter + 1
        elif name.endswith("_proj.weight"):
            layer = name.removesuffix(".weight")
            for part, shape in adapter.shapes(recipe.model.adapter, *parameter.shape).items():
                tensors[f"{layer}{part}"] = torch.randn(shape)
    spans = {SECTION + name: Span.whole(tensor) for name, tensor in tensors.items()}
    checkpoint.save(recipe.run.dir.checkpoints, 1, spans, {}, 0, 1)
    found = checkpoint.newest(recipe.run.dir.checkpoints)
    assert found is not None
    return Trained(recipe.run.dir, recipe, found, base.base)


@pytest.mark.parametrize("overrides", [(), ('model.adapter={"rank": 4}',)], ids=["full", "lora"])
def test_writing_takes_the_memory_of_one_shard_and_one_layer(
    overrides: tuple[str, ...], base: DemoPaths, tmp_path: Path
) -> None:
    trained = run_of(base, tmp_path, *overrides)
    plan = weights.Plan.of(trained)
    (tmp_path / "out").mkdir()
    assert peak(lambda: weights.write(trained, str(tmp_path / "out"), plan)) < SHARD + LAYER + SLACK

    def everything() -> None:  # the planted fault: the same result from all that there is at once
        held = {}
        for file in set(plan.files.values()):
            with Reader(paths.join(base.base, file)) as reader:
                held |= plan.fresh(trained, reader, list(reader.entries))
        assert held

    assert peak(everything) > SHARD + LAYER + SLACK
    before, after = (
        {p.name: load_file(p) for p in Path(f).glob("*.safetensors")} for f in (base.base, tmp_path / "out")
    )
    assert {file: set(tensors) for file, tensors in after.items()} == {f: set(t) for f, t in before.items()}
    for file, tensors in after.items():
        for key, tensor in tensors.items():
            if not overrides:
                assert torch.equal(tensor, before[file][key] + 1), key
            else:
                assert torch.equal(tensor, before[file][key]) == (not key.endswith("_proj.weight")), key


def test_layers_come_one_by_one_and_other_tensors_alone() -> None:
    keys = [
        "model.embed_tokens.weight",
        "model.layers.0.a",
        "model.layers.0.b",
        "model.layers.10.a",
        "model.norm.weight",
    ]
    assert list(weights.by_layer(keys)) == [keys[:1], keys[1:3], keys[3:4], keys[4:]]


def test_files_are_those_that_safetensors_reads_and_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "count": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
    }
    entries = {name: tensorfile.Entry.of(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    file = tmp_path / "model.safetensors"
    with tensorfile.Writer(str(file), entries) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)
    loaded = load_file(file)
    with Reader(str(file)) as reader:
        assert set(reader.entries) == set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor) and torch.equal(reader.read(name), tensor)
            assert b"".join(reader.blocks(name)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_an_adapter_is_read_layer_by_layer(base: DemoPaths, tmp_path: Path) -> None:
    trained = run_of(base, tmp_path, 'model.adapter={"rank": 4}')
    entries = lora.entries(trained)
    assert [key for key, _ in lora.matrices(trained, entries)] == list(entries)
    ups = [key for key, tensor in lora.matrices(trained, entries, adapter.UP) if tensor.any()]
    assert ups == [key for key in entries if key.endswith(".lora_B.weight")]
