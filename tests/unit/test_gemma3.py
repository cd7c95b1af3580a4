"""Gemma 3 done right, on tiny random models of the true classes; other families take the same path.

Each test stands for a fault that users have met: see the names.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ray_ft.data.pack import START, Rows, labels, pack, position_ids
from ray_ft.data.render import Tokens
from ray_ft.errors import ModelError
from ray_ft.model import attention, freeze, load
from ray_ft.model.loss import LossModel, decoder_layers
from ray_ft.span import Span

FAMILIES = ("gemma3", "gemma3_text", "llama", "qwen3")


def model_of(family: str) -> Any:
    if family == "qwen3":
        torch.manual_seed(3)
        return Qwen3ForCausalLM(Qwen3Config(**tiny.SIZES, num_hidden_layers=2, tie_word_embeddings=False)).eval()
    return tiny.filled(family)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with each family's model, as save_pretrained writes it."""
    found = {}
    for family in FAMILIES:
        found[family] = str(tmp_path_factory.mktemp(family))
        model_of(family).save_pretrained(found[family])
    return found


def filled(folder: str, implementation: str = "sdpa") -> Any:
    model = load.build(load.load_config(folder), implementation)
    load.allocate(model, torch.device("cpu"))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))  # nothing may stay as it was
    load.fill(model, folder, {name: Span.whole(p) for name, p in model.named_parameters()})
    return model.eval()


# -------------------------------------------------------------------------------------------------- right class


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_transformers_loads(family: str, folders: dict[str, str]) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    found = filled(folders[family])
    assert type(found) is type(expected)
    for name, parameter in expected.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], parameter), name
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    ids = torch.arange(3, 20)[None]
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_vision_language_checkpoint_keeps_its_tower_and_a_text_one_has_none(folders: dict[str, str]) -> None:
    assert isinstance(filled(folders["gemma3"]), Gemma3ForConditionalGeneration)
    assert isinstance(filled(folders["gemma3_text"]), Gemma3ForCausalLM)


def test_both_layouts_of_a_vision_language_checkpoint_load(folders: dict[str, str], tmp_path: Path) -> None:
    published = load_file(Path(folders["gemma3"], "model.safetensors"))
    assert any(key.startswith("language_model.model.") for key in published)  # what Google publishes
    model = model_of("gemma3")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.startswith("model.language_model.") for key in load_file(tmp_path / "model.safetensors"))
    for folder in (folders["gemma3"], str(tmp_path)):
        for name, parameter in filled(folder).named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name]), name


@pytest.mark.parametrize(("weights", "config"), [("gemma3", "gemma3_text"), ("gemma3_text", "gemma3")])
def test_weights_under_the_other_class_stop_the_run_instead_of_training_random_ones(
    weights: str, config: str, folders: dict[str, str], tmp_path: Path
) -> None:
    for name, source in (("model.safetensors", weights), ("config.json", config)):
        (tmp_path / name).write_bytes(Path(folders[source], name).read_bytes())
    with pytest.raises(ModelError, match="missing") as caught:
        filled(str(tmp_path))
    assert "model's" in str(caught.value)  # says whose weights they are


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_27b_scales_attention_by_its_query_pre_attn_scalar_not_by_its_head_dim() -> None:
    from ray_ft.plan.shapes import find_config

    config = find_config("google/gemma-3-27b-it")
    text = config.get_text_config()
    assert (text.query_pre_attn_scalar, text.head_dim) == (168, 128)
    model = load.build(config)
    layers = model.get_decoder().layers
    assert {layer.self_attn.scaling for layer in layers} == {168**-0.5}
    assert 168**-0.5 != 128**-0.5


def test_the_embedding_scale_comes_back_after_the_meta_device(folders: dict[str, str]) -> None:
    model = filled(folders["gemma3_text"])
    embedding = model.get_input_embeddings()
    assert float(embedding.embed_scale) == pytest.approx(64**0.5)
    ids = torch.tensor([[5]])
    torch.testing.assert_close(embedding(ids)[0, 0], embedding.weight[5] * 64**0.5)


def test_tied_embeddings_are_one_tensor_whose_gradient_is_the_sum_of_both_uses(folders: dict[str, str]) -> None:
    model = filled(folders["gemma3_text"])
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    LossModel(model, 64)(*batch(pack_of([6, 9]))).sum().backward()
    gradient = table.grad.clone()

    apart = copy.deepcopy(model)
    apart.get_output_embeddings().weight = torch.nn.Parameter(table.detach().clone())
    apart.zero_grad()
    LossModel(apart, 64)(*batch(pack_of([6, 9]))).sum().backward()
    looked_up, projected = apart.get_input_embeddings().weight.grad, apart.get_output_embeddings().weight.grad
    assert looked_up.abs().sum() > 0 and projected.abs().sum() > 0
    torch.testing.assert_close(gradient, looked_up + projected)


def test_the_older_way_of_writing_rope_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """Published Gemma 3 configs say rope_theta, rope_local_base_freq and rope_scaling; transformers 5 nests them."""
    text = {**tiny.SIZES, "num_hidden_layers": 6, "model_type": "gemma3_text", "sliding_window_pattern": 6}
    text |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps({**text, "architectures": ["Gemma3ForCausalLM"]}))
    model = load.build(load.load_config(str(tmp_path)))
    load.allocate(model, torch.device("cpu"))
    model.initialize_weights()
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    exponents = torch.arange(0, 32, 2) / 32
    for kind, expected in (("full", 1e6**-exponents / 8), ("sliding", 1e4**-exponents)):
        [found] = [buffer for name, buffer in frequencies.items() if kind in name and "original" not in name]
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------- packing


def pack_of(lengths: list[int], length: int = 32) -> Rows:
    rng = np.random.default_rng(0)
    samples = [Tokens(rng.integers(3, 60, n).astype(np.int32), np.arange(n) > 1) for n in lengths]
    rows, _ = pack(samples, length, packing=True, pad_id=0)
    return rows


def batch(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arrays = (rows.input_ids.astype(np.int64), position_ids(rows.flags), labels(rows.input_ids, rows.flags))
    a, b, c = (torch.from_numpy(array) for array in arrays)
    return a, b, c


FLEX = pytest.param(
    "gemma3_text",
    "flex_attention",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles it on CPUs, with g++"),
)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*((family, name) for family in FAMILIES for name in ("sdpa", "eager")), FLEX],
)
def test_packed_documents_do_not_see_each_other(family: str, implementation: str, folders: dict[str, str]) -> None:
    module = LossModel(filled(folders[family], implementation), 7)
    both = pack_of([12, 15])
    starts = np.flatnonzero(both.flags[0] & START)[:2].tolist()  # a third begins the padding
    assert (len(both), len(starts)) == (1, 2)  # one row holds both
    ends = [*starts[1:], 27]
    alone = [Rows(both.input_ids[:, a:b], both.flags[:, a:b]) for a, b in zip(starts, ends, strict=True)]
    with torch.no_grad():
        together = module(*batch(both)).sum()
        apart = sum(module(*batch(rows)).sum() for rows in alone)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
        # Positions that run on are what a leak looks like.
        inputs, _, wanted = batch(both)
        leaking = module(inputs, torch.arange(32)[None], wanted)
    assert abs(float(leaking - apart)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_through_the_same_path(family: str, folders: dict[str, str]) -> None:
    model = filled(folders[family])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    unreached = set(freeze.unreachable(model))
    assert bool(unreached) == (family == "gemma3")
    module = LossModel(model, 16).train()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n not in unreached], lr=3e-3)
    inputs = batch(pack_of([20, 11]))
    losses = []
    for _ in range(8):
        loss = module(*inputs).sum()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert set(missing) == unreached
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("family", "kinds"), [("gemma3", {"Gemma3DecoderLayer", "SiglipEncoderLayer"}), ("llama", {"LlamaDecoderLayer"})]
)
def test_blocks_are_the_layers_of_the_decoder_and_of_the_tower(family: str, kinds: set[str]) -> None:
    blocks = decoder_layers(tiny.meta(family))
    assert {type(block).__name__ for block in blocks} == kinds
    assert len(blocks) == (3 if family == "gemma3" else 2)


# ---------------------------------------------------------------------------------------------------- attention


def test_auto_says_what_it_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("gemma3_text")
    assert attention.choose("auto", "cpu", config) == attention.Choice(
        "sdpa", "sdpa, not flash_attention_2: it needs a GPU, and the device is cpu"
    )
    found = attention.choose("auto", "cuda", config)
    assert found.implementation == "sdpa" and "flash_attn is not installed" in found.reason
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert attention.choose("auto", "cuda", config).implementation == "flash_attention_2"
    wide = tiny.config("gemma3_text")
    wide.head_dim = 512
    assert "512 dimensions" in attention.choose("auto", "cuda", wide).reason
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert "too old" in attention.choose("auto", "cuda", config).reason


def test_an_implementation_that_is_asked_for_is_taken_or_refused() -> None:
    config = tiny.config("llama")
    for name, device in (("sdpa", "cpu"), ("eager", "cpu"), ("flex_attention", "cuda")):
        assert attention.choose(name, device, config).implementation == name
    with pytest.raises(ModelError, match=r"'flash_attention_2' cannot be used: it needs a GPU") as caught:
        attention.choose("flash_attention_2", "cpu", config)
    assert "auto" in str(caught.value)
