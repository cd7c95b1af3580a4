"""Loading: meta build and fill give exactly what `from_pretrained` gives; all but a whole model is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from distributed import build, recipe_of, run, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config

from ray_ft.data.render import load_tokenizer
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError
from ray_ft.model import adapter, load
from ray_ft.recipe.model import Adapter
from ray_ft.span import Span
from ray_ft.strategy.fsdp import FSDP

IDS = torch.tensor([[2, 9, 30, 31, 32, 33, 7, 8]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with its own head, in two shards and an index, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="11KB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return str(folder)


def filled(folder: str) -> PreTrainedModel:
    model = load.build(load.load_config(folder))
    allocate(model)
    load.fill(model, folder, load.whole_spans(model))
    return model


def allocate(model: PreTrainedModel) -> None:
    load.allocate(model, torch.device("cpu"))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)  # nothing may stay as it was


def check_equal_to_from_pretrained(folder: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = filled(folder)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=0, atol=0)
    for (name, buffer), (_, other) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_gemma_equals_from_pretrained(demo: DemoPaths) -> None:
    check_equal_to_from_pretrained(demo.base)


def test_sharded_untied_llama_equals_from_pretrained(llama: str) -> None:
    check_equal_to_from_pretrained(llama)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_in_several_files_equals_from_pretrained(family: str, tmp_path: Path) -> None:
    folder = models.write(tmp_path, family, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_equal_to_from_pretrained(folder)


#: What has been done to the published keys of a vision-language model.
LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "as published": (),
    "as transformers 5 saves it": (("vision_tower.vision_model.", "vision_tower."),),
    "as transformers 4.57 has it in memory": (("language_model.model.", "language_model."), ("", "model.")),
    "as transformers 5 has it in memory": (
        ("language_model.model.", "language_model."), ("vision_tower.vision_model.", "vision_tower."), ("", "model."),
    ),
}  # fmt: skip


def renamed(key: str, changes: tuple[tuple[str, str], ...]) -> str:
    for beginning, other in changes:
        if key.startswith(beginning):
            key = other + key.removeprefix(beginning)
    return key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_vision_language_model_loads_and_keeps_its_keys(layout: str, tmp_path: Path) -> None:
    folder = models.write(tmp_path, "gemma3")
    published = set(load.weight_files(folder))
    assert {"language_model.model.norm.weight", "vision_tower.vision_model.post_layernorm.weight"} <= published
    change_key = partial(renamed, changes=LAYOUTS[layout])
    models.rename(tmp_path, change_key)
    check_equal_to_from_pretrained(folder)
    model = load.build(load.load_config(folder))
    keys = load.stored_keys(model, load.weight_files(folder))
    assert keys.keys() == {name for name, _ in model.named_parameters()}
    assert set(keys.values()) == set(map(change_key, published))
    assert keys["model.language_model.norm.weight"] == change_key("language_model.model.norm.weight")


def test_buffers_are_computed_again_after_new_memory(demo: DemoPaths) -> None:
    model = filled(demo.base)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    allocate(model)
    load.fill(model, demo.base, load.whole_spans(model))
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_gemmas_computed_buffers_are_right_after_the_meta_device(demo: DemoPaths) -> None:
    model = filled(demo.base)
    buffers = dict(model.named_buffers())
    assert buffers["model.embed_tokens.embed_scale"] == pytest.approx(32**0.5)
    for kind, theta in (("sliding", 10_000.0), ("full", 1_000_000.0)):
        frequencies = theta ** (-torch.arange(0, 32, 2) / 32)
        torch.testing.assert_close(buffers[f"model.rotary_emb.{kind}_attention_inv_freq"], frequencies)


def test_building_takes_no_memory_and_keeps_ties(demo: DemoPaths) -> None:
    assert all(p.is_meta for p in load.build(load.load_config(demo.base)).parameters())
    model = filled(demo.base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def broken(demo: DemoPaths, llama: str, tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a model to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree({"gemma": demo.base, "llama": llama}[name], tmp_path / name))

    return copy


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder: Path, *words: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        filled(str(folder))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.ways_out
    return caught.value


def test_a_model_is_built_without_packages_that_take_seconds_to_import(demo: DemoPaths) -> None:
    code = f"""
import sys
from ray_ft.data.render import load_tokenizer
from ray_ft.model import load
load_tokenizer({demo.base!r})
load.build(load.load_config({demo.base!r}))
print({{"sklearn", "scipy", "transformers.generation.candidate_generator"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'transformers.generation.candidate_generator'}"


def test_missing_key(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    change(folder / load.SINGLE, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "1 missing", "model.layers.1.mlp.up_proj.weight", str(folder))


def test_unexpected_key(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    change(folder / load.SINGLE, lambda tensors: tensors.update({"model.layers.2.extra.weight": torch.ones(2)}))
    refused(folder, "1 unexpected", "model.layers.2.extra.weight")


def test_an_untied_model_without_its_head_is_not_given_a_random_one(broken: Callable[[str], Path]) -> None:
    folder = broken("llama")
    index = json.loads((folder / load.INDEX).read_text())
    file = folder / index["weight_map"].pop("lm_head.weight")
    (folder / load.INDEX).write_text(json.dumps(index))
    change(file, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "1 missing (lm_head.weight)")


def test_a_stored_duplicate_of_a_tied_weight_is_harmless(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    change(
        folder / load.SINGLE,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    filled(str(folder))


def test_a_stored_duplicate_with_another_value_is_not_passed_over(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    change(folder / load.SINGLE, edit)
    refused(folder, "lm_head.weight", "differs from model.embed_tokens.weight", "tie_word_embeddings")


def test_a_head_of_an_untied_model_is_no_duplicate(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    change(folder / load.SINGLE, lambda tensors: tensors.update({"model.lm_head.weight": torch.ones(2)}))
    refused(folder, "1 unexpected (model.lm_head.weight)")


def test_two_layouts_in_one_folder(tmp_path: Path) -> None:
    folder = Path(models.write(tmp_path, "gemma3"))
    name = "language_model.norm.weight"
    change(folder / load.SINGLE, lambda tensors: tensors.update({f"model.{name}": torch.ones(32)}))
    refused(folder, f"holds model.{name} twice", "language_model.model.norm.weight")


def test_buffers_that_older_checkpoints_hold_are_passed_over(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder / load.SINGLE, lambda tensors: tensors.update({key: torch.zeros(16)}))
    check_equal_to_from_pretrained(str(folder))


def test_a_model_that_is_no_decoder() -> None:
    with pytest.raises(ModelError, match="'t5' has no causal language model") as caught:
        load.build(T5Config(num_layers=1))
    assert caught.value.ways_out


def test_wrong_shape(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    change(folder / load.SINGLE, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    refused(folder, "model.norm.weight", "(31,)", "(32,)")


def test_missing_shard_file(broken: Callable[[str], Path]) -> None:
    folder = broken("llama")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    refused(folder, gone.name, "not there")


def test_truncated_weights(broken: Callable[[str], Path]) -> None:
    for name in ("gemma", "llama"):
        folder = broken(name)
        file = max(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
        refused(folder, file.name)


def test_shard_without_the_tensor_that_the_index_promises(broken: Callable[[str], Path]) -> None:
    folder = broken("llama")
    index = json.loads((folder / load.INDEX).read_text())["weight_map"]
    change(folder / index["lm_head.weight"], lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "lm_head.weight", index["lm_head.weight"])


def test_broken_index(broken: Callable[[str], Path]) -> None:
    folder = broken("llama")
    (folder / load.INDEX).write_text('{"weight_map": {')
    refused(folder, load.INDEX)


def test_a_fingerprint_is_of_every_tensor_and_of_whole_files(broken: Callable[[str], Path]) -> None:
    folder = broken("llama")
    before = load.fingerprint(str(folder))
    assert load.fingerprint(str(folder)) == before
    path = next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the last tensor is small
    assert load.fingerprint(str(folder)) != before
    path.write_bytes(b"\xff" * 16)
    with pytest.raises(ModelError, match="is damaged"):
        load.fingerprint(str(folder))


def test_no_weights(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    (folder / load.SINGLE).unlink()
    refused(folder, "no weights", load.SINGLE, load.INDEX)


@pytest.mark.parametrize("content", [None, "", "{", '{"model_type": "no_such_family"}', "[]"])
def test_broken_config(broken: Callable[[str], Path], content: str | None) -> None:
    folder = broken("gemma")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    refused(folder, "config.json", str(folder))


def test_no_tokenizer(broken: Callable[[str], Path]) -> None:
    folder = broken("gemma")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)


# ------------------------------------------------------------------------------------------------------- sharded


def fill_sharded(rank: int, world: int, demo: DemoPaths, llama: str) -> list[tuple[dict[str, torch.Tensor], int]]:
    found = []
    for folder in (demo.base, llama):
        strategy = build(recipe_of(demo, "/none", f"model.path={folder}", "train.strategy=fsdp"), rank, world)
        assert isinstance(strategy, FSDP)
        held = sum(p.to_local().numel() for p in strategy.module.parameters())
        found.append((weights(strategy), held))
    return found


def test_two_ranks_fill_half_each_and_together_the_whole(demo: DemoPaths, llama: str) -> None:
    ranks = run(2, fill_sharded, demo, llama)
    for at, folder in enumerate((demo.base, llama)):
        stored: dict[str, Any] = {}
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
        total = sum(tensor.numel() for tensor in stored.values())
        for whole, held in (rank[at] for rank in ranks):
            assert whole.keys() == stored.keys()
            assert all(torch.equal(whole[name], stored[name]) for name in stored)
            assert held < 0.6 * total


def cut(model: PreTrainedModel, rank: int, world: int) -> dict[str, Span]:
    """Spans as ZeRO-3 cuts: anywhere, in memory of their own; the parameters themselves are emptied."""
    spans = {}
    for name, parameter in model.named_parameters():
        count, shape = parameter.numel(), tuple(parameter.shape)
        start, stop = count * rank // world, count * (rank + 1) // world
        spans[name] = Span(torch.full((stop - start,), float("nan")), start, shape)
        parameter.data = torch.empty(0)
    return spans


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_runs_that_are_cut_anywhere_fill_emptied_parameters(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "BLOCK", 100)  # several blocks, and rows that are wider than one
    folder = models.write(tmp_path, family)
    expected, ranks = filled(folder), []
    for rank in range(3):
        model = load.build(load.load_config(folder))
        allocate(model)
        spans = cut(model, rank, 3)
        load.fill(model, folder, spans)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        for (name, buffer), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
            assert torch.equal(buffer, other), name
        ranks.append(spans)
    for name, parameter in expected.named_parameters():
        assert torch.equal(torch.cat([spans[name].data for spans in ranks]), parameter.detach().view(-1)), name


class Recorder:
    """A safetensors file that notes which rows of which tensor are read."""

    def __init__(self, tensors: Any, reads: list[tuple[str, int, int]]) -> None:
        self._tensors, self._reads = tensors, reads

    def keys(self) -> Any:
        return self._tensors.keys()

    def get_slice(self, key: str) -> Any:
        return RecordedSlice(key, self._tensors.get_slice(key), self._reads)


class RecordedSlice:
    def __init__(self, key: str, source: Any, reads: list[tuple[str, int, int]]) -> None:
        self._key, self._source, self._reads = key, source, reads
        self.get_shape = source.get_shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        assert isinstance(rows, slice)
        self._reads.append((self._key, rows.start, rows.stop))
        return self._source[rows]


@pytest.mark.parametrize("block", [1, 64, 1 << 24])
def test_only_the_rows_of_a_span_are_read_a_block_at_a_time(
    block: int, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, int, int]] = []
    opened = load._opened

    @contextlib.contextmanager
    def recorded(path: str) -> Iterator[Recorder]:
        with opened(path) as tensors:
            yield Recorder(tensors, reads)

    monkeypatch.setattr(load, "_opened", recorded)
    monkeypatch.setattr(load, "BLOCK", block)
    model = load.build(load.load_config(llama))
    allocate(model)
    spans = cut(model, 3, 7)
    load.fill(model, llama, spans)
    for name, span in spans.items():
        row = span.numel // span.shape[0]
        rows = [at for key, start, stop in reads if key == name for at in range(start, stop)]
        assert rows == list(range(span.start // row, -(-span.stop // row))), name
        assert all((stop - start) * row <= max(block, row) for key, start, stop in reads if key == name)


def test_beneath_an_adapter_the_base_is_filled_and_the_adapter_left_alone(tmp_path: Path) -> None:
    folder = models.write(tmp_path, "gemma3")
    expected = dict(filled(folder).named_parameters())
    model = load.build(load.load_config(folder))
    settings = Adapter(rank=2)
    adapter.inject(model, settings, adapter.targets(model, settings))
    allocate(model)
    load.fill(model, folder, load.whole_spans(model))
    own = 0
    for name, parameter in model.named_parameters():
        if (stored := adapter.stored_name(name)) is None:
            assert parameter.isnan().all(), name
            own += 1
        else:
            assert torch.equal(parameter, expected[stored]), name
    assert own == 3 * 7 * 2
    assert isinstance(model.get_submodule("model.language_model.layers.0.mlp.up_proj.base_layer"), nn.Linear)
