"""Loading: meta build and fill give exactly what `from_pretrained` gives; all but a whole model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import build, recipe_of, run, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ray_ft.data.render import load_tokenizer
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError
from ray_ft.model import load
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
    load.allocate(model, torch.device("cpu"))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan")) if tensor.is_floating_point() else None  # nothing may stay as it was
    load.fill(model, folder, {name: Span.whole(p) for name, p in model.named_parameters()})
    return model


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
