"""Optimizers: ours against the one published with transformers, sharded against whole, and their state by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed import build, recipe_of, run, weights, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError
from ray_ft.recipe import Optimizer
from ray_ft.train import optim

SHAPES = {"matrix": (5, 7), "tall": (64, 3), "one_row": (1, 6), "bias": (9,), "experts": (4, 3, 5)}
ADAFACTOR = Optimizer(name="adafactor", lr=0.02, weight_decay=0.1)
ADAMW = Optimizer(name="adamw", lr=0.02, weight_decay=0.1)


def values(step: int) -> dict[str, torch.Tensor]:
    """Step 0: parameters; then gradients: of ordinary size, tiny, huge, and zero in whole rows."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if step:
        scale = (1.0, 1e-6, 1e4)[step % 3]
        found = {name: tensor * scale for name, tensor in found.items()}
        found["matrix"][2] = 0
        found["tall"][:, 1] = 0
    return found


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in values(0).items()}


def steps(optimizer: torch.optim.Optimizer, over: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, gradient in values(step).items():
            over[name].grad = gradient
        optimizer.step()


def test_adafactor_equals_that_of_transformers() -> None:
    from transformers.optimization import Adafactor as Theirs

    ours, theirs = parameters(), parameters()
    optimizer = optim.build(ADAFACTOR, ours.items())
    # They apply weight decay to whatever they are given; ours not to vectors.
    groups = [
        {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    other = Theirs(groups, lr=0.02, scale_parameter=False, relative_step=False, warmup_init=False)
    for step in range(1, 9):
        steps(optimizer, ours, step, step)
        steps(other, theirs, step, step)
        for name in SHAPES:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6, msg=f"{name}, step {step}")


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_weight_decay_leaves_biases_norms_and_embeddings_alone(settings: Optimizer) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", "q_proj.bias", "q_proj.weight"]
    shapes = [(4, 4), (4,), (4,), (4, 4)]
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in zip(names, shapes, strict=True)}
    named["frozen.weight"] = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    optimizer = optim.build(settings, named.items())
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in named.items() if (parameter != 1).any()}
    assert moved == {"q_proj.weight"}
    torch.testing.assert_close(named["q_proj.weight"].data, torch.full((4, 4), 1 - 0.02 * 0.1))


def test_nothing_trained_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameter is trained"):
        optim.build(ADAMW, [("a", nn.Parameter(torch.ones(2), requires_grad=False))])


def test_adafactors_state_is_factored() -> None:
    over = parameters()
    optimizer = optim.build(ADAFACTOR, over.items())
    held = optim.state_tensors(optimizer, {p: name for name, p in over.items()})
    assert {key: tuple(value.shape) for key, value in held["tall"].items()} == {
        "step": (),
        "row": (64,),
        "column": (3,),
    }
    assert {key: tuple(value.shape) for key, value in held["bias"].items()} == {"step": (), "moment": (9,)}


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_state_goes_out_and_in_by_name_and_the_steps_continue(settings: Optimizer) -> None:
    straight = parameters()
    steps(optim.build(settings, straight.items()), straight, 1, 6)

    first = parameters()
    optimizer = optim.build(settings, first.items())
    steps(optimizer, first, 1, 3)
    held = optim.state_tensors(optimizer, {p: name for name, p in first.items()})

    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    optimizer = optim.build(settings, second.items())
    before = {name: p.detach().clone() for name, p in second.items()}
    fresh = optim.state_tensors(
        optimizer, {p: name for name, p in second.items()}
    )  # as restoring does: filled in place
    assert all(torch.equal(second[name], before[name]) for name in before)  # creating it has moved nothing
    assert all(p.grad is None for p in second.values())
    assert [group["lr"] for group in optimizer.param_groups] == [0.02] * len(optimizer.param_groups)
    for name, state in held.items():
        assert fresh[name].keys() == state.keys()
        for key, value in state.items():
            assert not fresh[name][key].any()
            fresh[name][key].copy_(value)
    steps(optimizer, second, 4, 6)
    assert all(torch.equal(second[name], straight[name]) for name in SHAPES)


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_state_covers_a_parameter_that_never_had_a_gradient(settings: Optimizer) -> None:
    # A vision tower under text, say. What is saved must be what a fresh optimizer expects to find again.
    over = parameters()
    optimizer = optim.build(settings, over.items())
    names = {p: name for name, p in over.items()}
    del over["bias"]
    for step in (1, 2):
        for name, parameter in over.items():
            parameter.grad = values(step)[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    before = {name: p.detach().clone() for name, p in over.items()}
    held = optim.state_tensors(optimizer, names)
    assert held.keys() == SHAPES.keys()
    assert not any(value.any() for value in held["bias"].values())
    assert held["matrix"]["step"] == 2
    assert all(torch.equal(over[name], before[name]) for name in over)


# ------------------------------------------------------------------------------------------------------- sharded


def sharded_steps(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    """Steps over parameters sharded by rows; returns parameters and state, whole."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name in names:
        settings = {"adamw": ADAMW, "adafactor": ADAFACTOR}[name]
        over = {k: nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for k, v in values(0).items()}
        optimizer = optim.build(settings, over.items())
        for step in range(1, 7):
            for k, gradient in values(step).items():
                over[k].grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
        state = optim.state_tensors(optimizer, {p: k for k, p in over.items()})
        found[name] = (
            {k: whole(p) for k, p in over.items()},
            {k: {key: whole(value) for key, value in held.items()} for k, held in state.items()},
        )
    return found


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    return run(2, sharded_steps, ["adamw", "adafactor"])


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_sharded_over_two_equals_whole(settings: Optimizer, sharded: list[dict[str, Any]]) -> None:
    # One row over two ranks and five rows over two: a rank may hold nothing, or less than the other.
    expected = parameters()
    optimizer = optim.build(settings, expected.items())
    steps(optimizer, expected, 1, 6)
    state = optim.state_tensors(optimizer, {p: name for name, p in expected.items()})
    for found, held in (rank[settings.name] for rank in sharded):
        for name in SHAPES:
            torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
            for key, value in state[name].items():
                torch.testing.assert_close(held[name][key], value, rtol=1e-5, atol=1e-30, msg=f"{name}.{key}")


def train_by_hand(rank: int, world: int, demo: DemoPaths, names: list[str], strategy: str) -> list[Any]:
    found = []
    for name in names:
        options = ["train.strategy=" + strategy, f"train.optimizer.name={name}", "train.optimizer.weight_decay=0.1"]
        made = build(recipe_of(demo, "/none", *options), rank, world)
        for step in range(3):
            ids = torch.randint(0, 600, (4, 16), generator=torch.Generator().manual_seed(step))
            mine = ids.chunk(world)[rank]
            made.backward(made.module(mine, torch.arange(16).expand(len(mine), 16), mine) / 60)
            made.finish(1.0)
            made.update(1e-3)
        found.append(weights(made.module))
    return found


def test_a_model_sharded_by_fsdp_takes_the_same_steps(demo: DemoPaths) -> None:
    names = ["adamw", "adafactor"]
    expected = train_by_hand(0, 1, demo, names, "none")
    for found in run(2, train_by_hand, demo, names, "fsdp"):
        for ours, theirs in zip(found, expected, strict=True):
            for name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4, msg=name)
                assert (ours[name] - theirs[name]).square().mean().sqrt() < 1e-6, name


def test_adafactor_clips_the_update_at_root_mean_square_one() -> None:
    parameter = nn.Parameter(torch.zeros(100))
    optimizer = optim.build(Optimizer(name="adafactor", lr=1.0), [("a", parameter)])
    for scale in (1e-3, 10.0):  # the second moment lags behind, so the second update would be far larger than 1
        before = parameter.detach().clone()
        parameter.grad = torch.full((100,), scale)
        optimizer.step()
        assert math.isclose((parameter.detach() - before).square().mean().sqrt(), 1.0, rel_tol=1e-5)
