"""Adapters: which modules get one, their initial values in any cut, and merging."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from distributed import build, recipe_of, run, weights
from tiny import LINEAR, filled, meta
from torch import nn

from ray_ft.data import pack
from ray_ft.data.stream import Batch
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError
from ray_ft.model import adapter, load
from ray_ft.recipe.model import Adapter
from ray_ft.span import Span
from ray_ft.train import loop

KINDS = ("lora", "rslora", "dora")


def names_of(model: nn.Module) -> list[str]:
    return adapter.targets(model, Adapter())


# --------------------------------------------------------------------------------------------------------- targets


def test_all_linear_is_every_linear_layer_but_the_output_projection_and_the_towers() -> None:
    for family in ("llama", "gemma3_text", "gemma3"):
        found = names_of(meta(family))
        assert len(found) == 14
        assert {name.rpartition(".")[2] for name in found} == set(LINEAR)
        assert not any("vision" in name or "projector" in name for name in found)
    # Without the default's exclusions, what no text reaches is still left out.
    model = meta("gemma3")
    everything = Adapter(exclude_modules=[])
    unreached = [name for name, _ in model.named_parameters() if "vision" in name]
    assert [n for n in adapter.targets(model, everything) if "vision" in n]
    assert adapter.targets(model, everything, unreached) == names_of(model)


@pytest.mark.parametrize(
    ("patterns", "exclude", "expected"),
    [
        (["*q_proj"], [], [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]),
        (["model.layers.1.*.?_proj"], ["*.o_proj"], [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]),
        (["*gate_proj", "*up_proj"], ["model.layers.[1-9]*"], [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")]),
        (["lm_head"], [], ["lm_head"]),
    ],
)
def test_patterns_match_whole_names_and_exactly_those_are_adapted(
    patterns: list[str], exclude: list[str], expected: list[str]
) -> None:
    model = meta("llama", layers=12)
    settings = Adapter(target_modules=patterns, exclude_modules=exclude)
    found = adapter.targets(model, settings)
    assert found == expected
    before = {name for name, _ in model.named_parameters()}
    adapter.inject(model, settings, found)
    own = {name for name, _ in model.named_parameters() if adapter.stored_name(name) is None}
    assert own == {f"{name}.lora_{x}.default.weight" for name in expected for x in "AB"}
    assert {adapter.stored_name(name) for name, _ in model.named_parameters()} - {None} == before
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("llama", {"target_modules": ["*q_prj"]}, "pattern '*q_prj' matches no module\n  → near: q_proj"),
        ("llama", {"target_modules": ["*Q_proj"]}, "pattern '*Q_proj' matches no module\n  → near: q_proj"),
        ("llama", {"target_modules": ["*q_proj", "x"]}, "pattern 'x' matches no module"),
        ("llama", {"target_modules": ["*embed_tokens"]}, "matches model.embed_tokens (Embedding), which is no linear"),
        ("llama", {"target_modules": ["*self_attn"]}, "model.layers.0.self_attn (LlamaAttention), which is no linear"),
        ("llama", {"exclude_modules": ["*"]}, "no module is left of target_modules 'all-linear'"),
        ("llama", {"target_modules": ["*q_proj"], "exclude_modules": ["*attn*"]}, "no module is left"),
        ("gemma3_text", {"target_modules": ["lm_head"]}, "lm_head, whose weight is the input embedding's too (tied)"),
        ("gemma3_text", {"target_modules": ["*"]}, "add to model.adapter.exclude_modules: 'lm_head'"),
        (
            "gemma3",
            {"target_modules": ["*q_proj"], "exclude_modules": []},
            "which no row of text reaches\n  → add to model.adapter.exclude_modules: 'model.vision_tower*'",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(family: str, settings: dict[str, Any], says: str) -> None:
    model = meta(family)
    unreached = [name for name, _ in model.named_parameters() if "vision" in name]
    with pytest.raises(ModelError) as error:
        adapter.targets(model, Adapter(**settings), unreached)
    assert says in str(error.value)


def test_a_tied_output_projection_can_be_excluded_by_name() -> None:
    model = meta("gemma3_text")
    everything = Adapter(target_modules=["*"], exclude_modules=["lm_head"])
    assert adapter.targets(model, everything) == names_of(model)


# -------------------------------------------------------------------------------------------------- initial values


def adapted(kind: str, family: str = "gemma3_text", rank: int = 3) -> tuple[Any, Any, Adapter]:
    """(The base, the adapted model with the base's values and nothing in the adapter, settings)."""
    base, model, settings = filled(family), filled(family), Adapter(name=kind, rank=rank, alpha=5.0)
    adapter.inject(model, settings, adapter.targets(model, settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter.stored_name(name) is None:
                own = torch.full(parameter.shape, float("nan"))
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Parameter(own))
    return base, model, settings


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_computes_what_the_base_does_and_is_distributed_as_in_peft(kind: str) -> None:
    base, model, _ = adapted(kind)
    adapter.initialise(model, load.whole_spans(model), seed=1)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=2e-6)
    for name, parameter in model.named_parameters():
        if name.endswith(adapter.DOWN):
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound
            reference = nn.init.kaiming_uniform_(torch.empty(3000, parameter.shape[1]), a=5**0.5)
            assert parameter.std().item() == pytest.approx(reference.std().item(), rel=0.2)
        elif name.endswith(adapter.UP):
            assert not parameter.any()
    downs = [p for name, p in model.named_parameters() if name.endswith(adapter.DOWN)]
    assert len({p.sum().item() for p in downs}) == len(downs)  # each has values of its own


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_weights_that_peft_would(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = Adapter(name=kind, rank=4, alpha=10.0)
    base = nn.Sequential(nn.Linear(24, 40, bias=False))
    weight = base[0].weight.detach().clone()
    options = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=10, target_modules=["0"], **options))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight if kind == "dora" else None
    with torch.no_grad():
        b.normal_()
        if magnitude is not None:
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
    expected_output = model(torch.eye(24)).detach()
    a, b = a.detach().clone(), b.detach().clone()
    magnitude = None if magnitude is None else magnitude.detach().clone()

    merged = adapter.merge(weight, a, b, magnitude, settings)
    torch.testing.assert_close(merged.T, expected_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, model.merge_and_unload()[0].weight.detach(), rtol=1e-6, atol=1e-6)
    assert (merged - weight).abs().max() > 0.1
    low = adapter.merge(weight.bfloat16(), a, b, magnitude, settings)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, adapter.merge(weight.bfloat16().float(), a, b, magnitude, settings).bfloat16())
    nothing = adapter.merge(weight.bfloat16(), a, torch.zeros_like(b), None, settings)
    assert torch.equal(nothing, weight.bfloat16())


# ------------------------------------------------------------------------------------------------ over many workers


def initial(rank: int, world: int, kind: str, cut: str) -> dict[str, torch.Tensor]:
    """This rank's run of each of the adapter's parameters, after `initialise`."""
    _, model, _ = adapted(kind)
    spans = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        size = flat.numel()
        start, stop = size * rank // world, size * (rank + 1) // world  # within rows, as ZeRO cuts
        if cut == "rows":
            row = size // parameter.shape[0]
            start, stop = (parameter.shape[0] * r // world * row for r in (rank, rank + 1))
        spans[name] = Span(flat[start:stop], start, tuple(parameter.shape))
        if cut == "copies":
            spans[name] = Span.whole(parameter, owner=rank == world - 1)
    adapter.initialise(model, spans, seed=7)
    return {name: span.data for name, span in spans.items() if adapter.stored_name(name) is None}


@pytest.mark.parametrize("world", [2, 3])
def test_initial_values_are_the_same_in_any_cut(world: int) -> None:
    for kind in ("rslora", "dora"):
        _, model, _ = adapted(kind)
        adapter.initialise(model, load.whole_spans(model), seed=7)
        expected = {name: p.detach() for name, p in model.named_parameters() if adapter.stored_name(name) is None}
        assert len(expected) == 14 * (3 if kind == "dora" else 2)
        for cut in ("flat", "rows", "copies") if kind == "dora" else ("flat",):
            ranks = run(world, initial, kind, cut)
            for name, tensor in expected.items():
                runs = [ranks[-1][name]] if cut == "copies" else [found[name] for found in ranks]
                assert torch.equal(torch.cat(runs), tensor.view(-1)), (kind, cut, name)
    other = adapted("lora")[1]
    adapter.initialise(other, load.whole_spans(other), seed=8)
    downs = [name for name in expected if name.endswith(adapter.DOWN)]
    assert not any(torch.equal(dict(other.named_parameters())[name], expected[name]) for name in downs)


LAYOUTS = {1: ("none",), 2: ("fsdp", "none", "zero3")}


def train_adapters(rank: int, world: int, demo: DemoPaths) -> dict[tuple[str, str], tuple[list[float], Any]]:
    """Losses of five steps and the adapter at their end, for each kind and strategy."""
    found = {}
    for kind, strategy in itertools.product(("lora", "dora"), LAYOUTS[world]):
        options = [f"train.strategy={strategy}", f"train.workers={world}", "train.optimizer.lr=0.02"]
        # Not the same parts on one worker and on two: the same summands would agree to the last bit by themselves.
        options += [f"train.micro_batch={8 if world == 1 else 2}"]
        recipe = recipe_of(demo, "/none", f"model.adapter={{name: {kind}, rank: 3}}", *options)
        built = build(recipe, rank, world)
        share = recipe.train.rows_per_worker
        losses = []
        for step in range(5):
            rng = np.random.default_rng(step % 2)
            ids = rng.integers(6, 40, (recipe.train.global_batch, 64)).astype(np.int32)
            rows = pack.Rows(ids, np.full(ids.shape, pack.REAL | pack.TRAINED, np.uint8))
            mine = Batch(0, rows.take(slice(rank * share, (rank + 1) * share)))
            losses.append(loop.train_step(built, mine, recipe.train, 0.02).loss)
        own = {name: tensor for name, tensor in weights(built).items() if adapter.stored_name(name) is None}
        found[kind, strategy] = losses, own
    return found


def test_sharded_adapters_learn_as_unsharded_ones_do(demo: DemoPaths) -> None:
    expected = run(1, train_adapters, demo)[0]
    for (kind, strategy), (losses, own) in run(2, train_adapters, demo)[0].items():
        wanted, values = expected[kind, "none"]
        assert wanted[0] - wanted[-1] > 0.05
        assert losses == pytest.approx(wanted, rel=1e-5), (kind, strategy)
        assert own.keys() == values.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, values[name], rtol=0, atol=2e-4, msg=f"{kind} {strategy} {name}")
    assert expected["lora", "none"][0] != pytest.approx(expected["dora", "none"][0], rel=1e-5)
