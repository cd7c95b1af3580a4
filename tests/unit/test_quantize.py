"""The base in 4 bits: what is refused, what is quantized, and that it computes with the rounded weights.

bitsandbytes is installed with the GPU requirements alone; its CPU code computes the same, so where it is installed the
layers are tested on the CPU too.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from distributed import build, recipe_of
from tiny import LINEAR, filled, meta
from torch import nn

from ray_ft.demo import DemoPaths
from ray_ft.errors import ResourceError
from ray_ft.model import adapter, quantize
from ray_ft.recipe.model import Adapter
from ray_ft.span import Span


def test_a_cpu_is_refused_with_the_ways_out() -> None:
    with pytest.raises(ResourceError) as error:
        quantize.check("cpu")
    assert str(error.value).splitlines()[0] == "model.quantize = 'nf4' needs GPUs, and train.device is 'cpu'"
    assert any("model.quantize=null" in way for way in error.value.ways_out)


def test_a_worker_on_a_cpu_refuses_before_it_reads_the_base(demo: DemoPaths) -> None:
    recipe = recipe_of(demo, "/none", "model.quantize=nf4", "model.adapter={rank: 2}", "model.path=no/where")
    with pytest.raises(ResourceError, match="needs GPUs"):
        build(recipe)


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = meta("llama")
    model.requires_grad_(False)
    for attempt in (
        lambda: quantize.check("cuda"),
        lambda: quantize.quantize(model, quantize.targets(model), torch.bfloat16),
        lambda: quantize.rounded(torch.ones(8, 8), torch.bfloat16),
    ):
        with pytest.raises(ResourceError, match="needs bitsandbytes") as error:
            attempt()
        assert "pip install bitsandbytes==0.50.2" in error.value.ways_out
    assert not any(quantize.layers(model))


def test_linear_layers_that_text_reaches_are_quantized_but_not_the_output_projection_nor_trained_ones() -> None:
    for family in ("llama", "gemma3_text", "gemma3"):
        model = meta(family)
        assert quantize.targets(model) == []  # all is trained
        model.requires_grad_(False)
        unreached = [name for name, _ in model.named_parameters() if "vision" in name]
        found = quantize.targets(model, unreached)
        assert len(found) == 14
        assert {name.rpartition(".")[2] for name in found} == set(LINEAR)
        model.get_submodule(found[3]).weight.requires_grad_(True)
        assert quantize.targets(model, unreached) == found[:3] + found[4:]


# ------------------------------------------------------------------------------------------- where it is installed


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def fill(model: nn.Module, base: nn.Module) -> list[str]:
    """Allocate a model and give it the base's weights as `load.fill` does. Returns the names of what was quantized."""
    model.to_empty(device="cpu")
    values, packed = dict(base.named_parameters()), dict(quantize.layers(model))
    for name, parameter in list(model.named_parameters()):
        stored = adapter.stored_name(name)
        if name in packed:
            quantize.store(packed[name], values[stored])
        elif stored:
            parameter.data.copy_(values[stored])
    adapter.initialise(model, {name: Span.whole(p) for name, p in model.named_parameters()}, seed=0)
    for (name, buffer), (_, source) in zip(model.named_buffers(), base.named_buffers(), strict=True):
        assert buffer.shape == source.shape, name
        buffer.copy_(source)
    return list(packed)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_over_4_bits_computes_and_learns_as_over_the_rounded_weights(bitsandbytes: Any, kind: str) -> None:
    base, settings = filled("llama"), Adapter(name=kind, rank=2)
    models, losses = [], []
    for packed in (True, False):
        model = meta("llama")
        model.requires_grad_(False)
        names = quantize.targets(model)
        adapter.inject(model, settings, adapter.targets(model, settings))
        if packed:
            quantize.quantize(model, [adapter.base_layer(name) for name in names], torch.float32)
        stored = fill(model, base)
        if not packed:
            with torch.no_grad():
                for name in names:
                    weight = model.get_submodule(name).get_base_layer().weight
                    weight.copy_(quantize.rounded(weight, torch.float32))
            adapter.initialise(model, {name: Span.whole(p) for name, p in model.named_parameters()}, seed=0)
        assert len(stored) == (14 if packed else 0)
        models.append(model.train())
    ids = torch.arange(24).view(2, 12)
    for model in models:
        own = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(own, lr=0.02)
        losses.append([])
        for _ in range(4):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] - losses[0][-1] > 0.05
    exact = base(ids, labels=ids).loss.item()
    assert 1e-5 < abs(losses[0][0] - exact) < 0.1  # rounding to 4 bits is seen, and small


def test_a_layer_holds_codes_of_the_size_that_is_planned_and_writes_into_what_was_allocated(bitsandbytes: Any) -> None:
    model = meta("llama")
    model.requires_grad_(False)
    name = "model.layers.0.mlp.up_proj"
    quantize.quantize(model, [name], torch.bfloat16)
    layer = model.get_submodule(name)
    assert layer.weight.is_meta and layer.weight.numel() == 128 * 64 // 2
    model.to_empty(device="cpu")
    place, weight = layer.weight.data_ptr(), torch.randn(128, 64) * 0.02
    quantize.store(layer, weight)
    state = layer.quant_state
    held = (layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    assert sum(t.numel() * t.element_size() for t in held) == quantize.stored_bytes(weight.numel())
    assert layer.weight.data_ptr() == place and layer.weight is dict(model.named_parameters())[f"{name}.weight"]
    assert torch.equal(quantize.dequantized(layer), quantize.rounded(weight, torch.bfloat16))
    error = (quantize.dequantized(layer).float() - weight).norm() / weight.norm()
    assert 0.01 < error < 0.15
    assert quantize.stored_bytes(21504 * 5376) < 0.52 * 21504 * 5376


def test_rounding_does_not_depend_on_the_length_of_rows(bitsandbytes: Any) -> None:
    weight = torch.randn(64, 80) * 0.02
    found = quantize.rounded(weight, torch.float32)
    assert (found - weight).norm() / weight.norm() < 0.15
    assert torch.equal(found.view(-1), quantize.rounded(weight.view(40, 128), torch.float32).view(-1))
