"""Optimizers as the recipe asks for them: groups, sharded against whole, and their state by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributed import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ray_ft.errors import ModelError
from ray_ft.recipe import Optimizer
from ray_ft.span import Span
from ray_ft.strategy import state
from ray_ft.strategy.base import Piece
from ray_ft.strategy.fsdp import first_row
from ray_ft.train import optim

SHAPES = {"matrix": (5, 7), "tall": (64, 3), "one_row": (1, 6), "bias": (9,), "experts": (4, 3, 5)}
ADAFACTOR = Optimizer(name="adafactor", lr=0.02, weight_decay=0.1)
ADAMW = Optimizer(name="adamw", lr=0.02, weight_decay=0.1)
MOMENTS = {"adamw": {"exp_avg", "exp_avg_sq"}, "adafactor": {"row", "column"}}

#: Names of nn.Embedding in models of several families, and of matrices that are none.
EMBEDDINGS = [
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens_per_layer.weight",
    "model.vision_tower.vision_model.embeddings.position_embedding.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.token_type_embeddings.weight",
    "gpt_neox.embed_in.weight",
    "model.embed_vision.embedding.weight",
    "visual.pos_embed.weight",
    "decoder.embed_positions.weight",
]
OTHERS = [
    "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
    "visual.patch_embed.proj.weight",
    "model.embed_vision.embedding_projection.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "lm_head.weight",
    "gpt_neox.embed_out.weight",
    "model.embed_tokens.lora_embedding_A.default",
    "embedder.mlp.up_proj.weight",
    "model.embed_vision.embedding_projection.lora_A.default.weight",
    "model.layers.0.self_attn.q_proj.base_layer.weight",
]


def values(step: int) -> dict[str, torch.Tensor]:
    """Step 0: parameters; then gradients."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in values(0).items()}


def pieces_of(over: dict[str, nn.Parameter]) -> Callable[[torch.Tensor], Iterator[Piece]]:
    def pieces(tensor: torch.Tensor) -> Iterator[Piece]:
        (name,) = (name for name, parameter in over.items() if parameter is tensor)
        if not isinstance(tensor, DTensor):
            yield Piece(name, 0, Span.whole(tensor), None)
            return
        begin = first_row(tensor) * (tensor.numel() // tensor.shape[0])
        local = tensor.detach().to_local().view(-1)
        yield Piece(name, 0, Span(local, begin, tuple(tensor.shape)), tensor.device_mesh.get_group())

    return pieces


def make(settings: Optimizer, over: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return optim.build(settings, over.items(), pieces_of(over))


def steps(optimizer: torch.optim.Optimizer, over: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, gradient in values(step).items():
            over[name].grad = gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def moments(optimizer: torch.optim.Optimizer, over: dict[str, nn.Parameter]) -> dict[str, dict[str, Span]]:
    return state.moments(optimizer, pieces_of(over), owner=True)


# ---------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_weight_decay_leaves_biases_norms_and_embeddings_alone(settings: Optimizer) -> None:
    vectors = ["model.norm.weight", "q_proj.bias", "q_proj.lora_magnitude_vector.default.weight"]
    named = {name: nn.Parameter(torch.ones(4, 4)) for name in EMBEDDINGS + OTHERS}
    named |= {name: nn.Parameter(torch.ones(4)) for name in vectors}
    named["frozen.weight"] = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    optimizer = make(settings, named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in named.items() if (parameter != 1).any()}
    assert moved == set(OTHERS)
    for name in OTHERS:
        torch.testing.assert_close(named[name].data, torch.full((4, 4), 1 - 0.02 * 0.1))


@pytest.mark.parametrize("family", ["gemma3", "gemma3n_text", "llama", "qwen3_vl", "gpt2", "siglip"])
def test_embeddings_are_known_by_their_names_in_models_of_transformers(family: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(family)
    for part in (config, *(getattr(config, key, None) for key in ("text_config", "vision_config", "audio_config"))):
        for key in ("num_hidden_layers", "n_layer", "depth", "conf_num_hidden_layers"):
            if part is not None and isinstance(getattr(part, key, None), int):
                setattr(part, key, 2)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert tables
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert optim.decays(name, parameter) != (name in tables), name


def test_nothing_trained_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameter is trained"):
        make(ADAMW, {"a": nn.Parameter(torch.ones(2), requires_grad=False)})


# ----------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_state_goes_out_and_in_by_name_and_the_steps_continue(settings: Optimizer) -> None:
    straight = parameters()
    steps(make(settings, straight), straight, 1, 6)

    first = parameters()
    optimizer = make(settings, first)
    steps(optimizer, first, 1, 3)
    held = moments(optimizer, first)
    assert held.keys() == SHAPES.keys()
    assert held["tall"].keys() == {"step"} | MOMENTS[settings.name]
    assert held["tall"]["step"].data.tolist() == [3]
    assert held["tall"]["step"].shape == ()

    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    optimizer = make(settings, second)
    for parameter in second.values():
        parameter.grad = torch.ones_like(parameter)
    fresh = moments(optimizer, second)  # as restoring does: filled in place
    assert all(torch.equal(second[name], first[name]) for name in SHAPES)  # creating it has moved nothing
    assert all((p.grad == 1).all() for p in second.values())
    assert [group["lr"] for group in optimizer.param_groups] == [0.02] * len(optimizer.param_groups)
    for name, of in held.items():
        assert fresh[name].keys() == of.keys()
        for key, span in of.items():
            assert not fresh[name][key].data.any()
            assert fresh[name][key].shape == span.shape
            fresh[name][key].data.copy_(span.data)
    state.restored(optimizer)
    steps(optimizer, second, 4, 6)
    assert all(torch.equal(second[name], straight[name]) for name in SHAPES)


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_state_covers_a_parameter_that_never_had_a_gradient(settings: Optimizer) -> None:
    # A vision tower under text, say. What is saved must be what a fresh optimizer expects to find again.
    over = parameters()
    optimizer = make(settings, over)
    for step in (1, 2):
        for name, parameter in over.items():
            parameter.grad = values(step)[name] if name != "bias" else None
        optimizer.step()
    before = {name: p.detach().clone() for name, p in over.items()}
    held = moments(optimizer, over)
    assert held.keys() == SHAPES.keys()
    assert not any(span.data.any() for span in held["bias"].values())
    assert held["matrix"]["step"].data == 2
    assert all(torch.equal(over[name], before[name]) for name in over)


def test_a_state_that_belongs_to_no_parameter_is_refused() -> None:
    over = {"a": nn.Parameter(torch.ones(3, 4))}
    optimizer = make(ADAMW, over)
    state.create(optimizer)
    optimizer.state[over["a"]]["rows"] = torch.ones(3)
    with pytest.raises(TypeError, match="'rows'"):
        moments(optimizer, over)


# --------------------------------------------------------------------------------------------------------- sharded


def sharded_steps(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    """Steps over parameters sharded by rows; returns this rank's runs of parameters and state."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name in names:
        over = {k: nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for k, v in values(0).items()}
        optimizer = make({"adamw": ADAMW, "adafactor": ADAFACTOR}[name], over)
        for step in range(1, 7):
            for k, gradient in values(step).items():
                over[k].grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
        weights = {k: next(iter(pieces_of(over)(p))).span for k, p in over.items()}
        found[name] = weights, state.moments(optimizer, pieces_of(over), owner=rank == 0)
    return found


def test_sharded_over_two_equals_whole() -> None:
    # One row over two ranks and five rows over two: a rank may hold nothing, or less than the other.
    ranks = run(2, sharded_steps, ["adamw", "adafactor"])
    for settings in (ADAMW, ADAFACTOR):
        expected = parameters()
        optimizer = make(settings, expected)
        steps(optimizer, expected, 1, 6)
        held = moments(optimizer, expected)
        owned = dict.fromkeys(SHAPES, 0)
        for rank, (weights, moved) in enumerate(found[settings.name] for found in ranks):
            for name in SHAPES:
                part = weights[name]
                whole = expected[name].detach().view(-1)
                torch.testing.assert_close(part.data, whole[part.start : part.stop], rtol=1e-5, atol=1e-6, msg=name)
                owned[name] += part.data.numel()
                assert moved[name].keys() == held[name].keys()
                for key, span in moved[name].items():
                    other = held[name][key]
                    assert span.shape == other.shape
                    torch.testing.assert_close(
                        span.data, other.data[span.start : span.stop], rtol=1e-5, atol=1e-30, msg=f"{name}.{key}"
                    )
                    if "exp_avg" in key:
                        assert (span.start, span.stop) == (part.start, part.stop)
                    else:
                        assert span.owner == (rank == 0)
                        assert span.data.numel() == other.numel
        assert owned == {name: span["step"].numel and expected[name].numel() for name, span in held.items()}
